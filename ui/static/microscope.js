/* The group microscope: what GRPO saw in one step.

   const microscope = grpo.microscope(host);
   microscope.show(runId, step)      show that step; it stays until the person follows the newest again
   microscope.latest(runId, step)    the run's newest step; shown unless the person has picked one
   microscope.missing(), .load()     whether the step that is wanted is not on screen; ask for it (again)
   microscope.clear()                nothing to show
   microscope.onStep = (step) => ... the person picked a step here
   microscope.onFollow = () => ...   the person went back to following the newest */
'use strict';

(() => {
  const { h, text } = grpo;
  const { GroupCard, openLarge, wireTokens } = grpo.microscopeParts;
  const name = (part) => `g-microscope-${part}`;
  const VIEWS = [['changes', 'Changes'], ['tokens', 'Tokens'], ['plain', 'Plain']];
  const ORDERS = [['reward', 'By reward'], ['sampled', 'As sampled']];
  const TOLD_AFTER = 120;  // ms of rest before onStep is told: a slider being dragged is not told step by step

  function segments(label, options, current, choose) {
    const buttons = options.map(([value, title]) => h('button', { type: 'button', 'aria-pressed': String(value === current), data: { value }, onclick: () => {
      for (const button of buttons) button.setAttribute('aria-pressed', String(button.dataset.value === value));
      choose(value);
    } }, title));
    return h('span', { class: 'g-segments', role: 'group', 'aria-label': label }, buttons);
  }

  const remembered = (key, options) => {
    const value = grpo.recall(`microscope.${key}`, options[0]);
    return options.includes(value) ? value : options[0];
  };

  class Microscope {
    constructor(host) {
      this.onStep = null;
      this.onFollow = null;
      this.view = remembered('view', VIEWS.map(([value]) => value));
      this.order = remembered('order', ORDERS.map(([value]) => value));
      this.shade = grpo.recall('microscope.shade', 'product');
      this.cards = [];
      this.forget(null);
      this.build(host);
      this.clear();
    }

    build(host) {
      const to = (action, glyph, label) => h('button', { type: 'button', class: 'g-icon', 'aria-label': label, title: label, onclick: action }, grpo.icon(glyph));
      this.back = to(() => this.pick(this.step - 1), 'left', 'Step before');
      this.on = to(() => this.pick(this.step + 1), 'right', 'Step after');
      this.range = h('input', { type: 'range', min: 1, max: 1, step: 1, value: 1, 'aria-label': 'Step shown', oninput: () => this.pick(Number(this.range.value)) });
      this.number = h('input', { type: 'number', class: 'g-input', min: 1, step: 1, 'aria-label': 'Step number',
        onchange: () => this.pick(Number(this.number.value)), onblur: () => this.controls() });
      this.total = h('span', { class: 'g-quiet' });
      this.follow = h('button', { type: 'button', class: 'g-button small', title: 'Show each new step as it is recorded', onclick: () => this.toggleFollow() }, 'Follow newest');
      this.bar = h('div', { class: name('controls') }, h('h2', {}, 'Group microscope'),
        h('span', { class: name('slider') }, this.back, this.range, this.on),
        h('span', { class: name('step') }, h('span', { class: 'g-quiet' }, 'step'), this.number, this.total), this.follow,
        h('span', { class: name('choices') },
          segments('Text', VIEWS, this.view, (value) => this.look('view', value)),
          segments('Order', ORDERS, this.order, (value) => this.look('order', value))));
      this.about = h('p', { class: ['g-quiet g-small', name('about')] });
      this.notes = h('div', { class: name('notes') });
      this.shadeSelect = h('select', { class: 'g-select', 'aria-label': 'Shade tokens by', onchange: () => this.look('shade', this.shadeSelect.value) });
      this.low = h('span', { class: 'g-number' });
      this.high = h('span', { class: 'g-number' });
      this.ramp = h('span', { class: name('ramp'), 'aria-hidden': 'true' });
      [this.says, this.along, this.against, this.push] = Array.from({ length: 4 }, () => h('span'));
      const told = (kind, node) => h('p', {}, h('span', { class: [name('token'), name('swatch'), kind], style: { '--size': '62%' } }, kind === 'along' ? 'blue' : 'orange'), node);
      this.sides = [told('along', this.along), told('against', this.against)];
      this.legend = h('div', { class: name('legend'), hidden: true }, h('div', { class: 'g-row' }, h('span', { class: 'g-quiet' }, 'Shaded by'), this.shadeSelect,
        h('span', { class: name('scale') }, this.low, this.ramp, this.high)), h('p', {}, this.says), this.sides, h('p', {}, this.push));
      this.groups = h('div', { class: 'g-stack' });
      this.empty = h('div', { hidden: true });
      this.node = h('section', { class: 'g-microscope', 'aria-label': 'Group microscope' }, this.bar, this.about, this.notes, this.legend, this.groups, this.empty);
      wireTokens(this.node);
      host.append(this.node);
    }

    // -- which step -----------------------------------------------------------------------------------

    forget(run) {
      this.run = run;
      this.step = 0;
      this.last = 0;
      this.picked = false;
      this.shown = null;  // "run step" of what is on screen
      this.data = null;
    }

    show(run, step) {
      if (!(step >= 1)) return;
      if (run !== this.run) this.forget(run);
      this.picked = true;
      this.step = step;
      this.controls();
      this.load();
    }

    latest(run, step) {
      if (run !== this.run) this.forget(run);
      if (step < this.last) this.shown = null;  // it went back to a checkpoint: its later steps are other ones now
      this.last = step;
      if (this.step > step) this.picked = false;
      if (!this.picked) this.step = step;
      this.controls();
      if (step) this.load();
      else this.vacant('No step yet', 'As soon as the first step is recorded, its groups appear here: every rewrite with its picture, reward and advantage.');
    }

    clear() {
      this.forget(null);
      this.controls();
      this.vacant('No run chosen', 'Choose a run to look at what each of its steps saw: the groups of rewrites, their pictures, rewards and advantages.');
    }

    /* The person chose a step. */
    pick(step) {
      if (!this.run || !Number.isFinite(step)) return;
      const target = Math.max(1, Math.min(this.last, Math.round(step)));
      const moved = target !== this.step || !this.picked;
      this.picked = true;
      this.step = target;
      this.controls();
      this.load();  // where it did not move too: its answer may have been lost
      if (!moved) return;
      clearTimeout(this.telling);
      this.telling = setTimeout(() => { if (this.onStep && this.picked) this.onStep(this.step); }, TOLD_AFTER);
    }

    toggleFollow() {
      if (!this.picked) {
        this.pick(this.step);
        return;
      }
      this.picked = false;
      this.step = this.last;
      this.controls();
      this.load();
      if (this.onFollow) this.onFollow();
    }

    controls() {
      const set = (node, key, value) => { if (node[key] !== value) node[key] = value; };
      const label = (node, key, value) => { if (node.getAttribute(key) !== value) node.setAttribute(key, value); };
      const none = !this.run || !this.last;
      set(this.range, 'max', String(Math.max(1, this.last)));
      set(this.range, 'value', String(Math.max(1, this.step)));
      label(this.range, 'aria-valuetext', `step ${this.step} of ${this.last}`);
      set(this.number, 'max', String(Math.max(1, this.last)));
      if (document.activeElement !== this.number || Number(this.number.value) > this.last) set(this.number, 'value', this.step ? String(this.step) : '');
      text(this.total, `of ${this.last || grpo.num(null)}`);
      set(this.range, 'disabled', none || this.last === 1);
      set(this.number, 'disabled', none);
      set(this.back, 'disabled', none || this.step <= 1);
      set(this.on, 'disabled', none || this.step >= this.last);
      set(this.follow, 'disabled', none);
      label(this.follow, 'aria-pressed', String(!this.picked));
    }

    missing() {
      return Boolean(this.run && this.step && this.shown !== `${this.run} ${this.step}`);
    }

    /* Ask for the step that is wanted until it is on screen; one question at a time, so scrubbing never piles up. */
    async load() {
      if (this.loading || !this.missing()) return;
      this.loading = true;
      this.node.setAttribute('aria-busy', 'true');
      try {
        while (this.missing()) {
          const { run, step } = this;
          let data = null, problem = '';
          try {
            data = await grpo.get('microscope/step', { run, step });
          } catch (error) {
            if (!(error instanceof grpo.Failure)) throw error;
            if (!error.status) break;  // no answer: whoever made this asks again by load()
            problem = error.message;
          }
          if (run !== this.run || (problem && step !== this.step)) continue;
          this.shown = `${run} ${step}`;
          if (problem) this.vacant('This step can\u2019t be shown', problem);
          else {
            this.data = data;
            this.last = Math.max(this.last, data.last);
            this.controls();
            this.draw();
          }
        }
      } finally {
        this.loading = false;
        this.node.removeAttribute('aria-busy');
      }
    }

    // -- drawing --------------------------------------------------------------------------------------

    look(key, value) {
      if (this[key] === value) return;
      this[key] = value;
      grpo.remember(`microscope.${key}`, value);
      if (this.data) this.draw();
    }

    vacant(title, message) {
      this.data = null;
      if (this.empty.hidden || this.empty.dataset.message !== message) this.empty.replaceChildren(grpo.empty(title, message));
      this.empty.dataset.message = message;
      this.arrange();
    }

    arrange() {
      const none = !this.data;
      this.empty.hidden = !none;
      for (const node of [this.about, this.notes, this.groups]) node.hidden = none;
      this.legend.hidden = none || this.view !== 'tokens';
    }

    draw() {
      const { data } = this;
      const shade = data.shades.find((item) => item.name === this.shade) || data.shades[0];
      const look = { view: this.view, order: this.order, shade, scales: data.scales };
      const rewrites = data.groups.reduce((sum, group) => sum + group.rollouts.length, 0);
      text(this.about, `${data.groups.length} ${data.groups.length === 1 ? 'prompt' : 'prompts'}, ${rewrites} rewrites. All pictures of a group start from the same noise, so only the text makes them differ. ${data.advantage}`);
      const pictures = data.pictures.note ? [h('p', { class: 'g-row' }, data.pictures.note, [data.pictures.before, data.pictures.after].map((step) => (step === null ? null
        : h('button', { type: 'button', class: 'g-button small plain', onclick: () => this.pick(step) }, `Step ${step}`))))] : [];
      this.note(data.notes, pictures);
      this.drawLegend(data, shade);
      while (this.cards.length > data.groups.length) this.cards.pop().node.remove();
      data.groups.forEach((group, place) => {
        if (!this.cards[place]) {
          this.cards[place] = new GroupCard((of, rollout) => openLarge(this.data, this.lookShown, of, rollout));
          this.groups.append(this.cards[place].node);
        }
        this.cards[place].update(group, data, look);
      });
      this.lookShown = look;
      this.arrange();
    }

    note(notes, pictures) {
      const key = JSON.stringify([notes, pictures.map((node) => node.textContent)]);
      if (this.noted === key) return;
      this.noted = key;
      this.notes.replaceChildren(...pictures, ...notes.map((note) => h('p', {}, note)));
    }

    drawLegend(data, shade) {
      if (!this.shadeSelect.options.length) this.shadeSelect.append(...data.shades.map((item) => h('option', { value: item.name }, item.label)));
      if (this.shadeSelect.value !== shade.name) this.shadeSelect.value = shade.name;
      const most = grpo.num(data.scales[shade.name], 2);
      text(this.low, shade.signed ? `\u2212${most}` : '0');
      text(this.high, shade.signed ? `+${most}` : most);
      this.ramp.classList.toggle('size', !shade.signed);
      text(this.says, shade.says);
      text(this.along, shade.along);
      text(this.against, shade.against);
      for (const side of this.sides) side.hidden = !shade.signed;
      text(this.push, data.push);
    }
  }

  grpo.microscope = (host) => new Microscope(host);
})();
