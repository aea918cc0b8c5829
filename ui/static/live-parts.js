/* Pieces of the live screen: the strip at its top, the newest pictures, the log. Each is made once in `host` and
   updated in place.

   const strip = grpo.live.strip(host, {pick, command});   strip.show(state), strip.tick(), strip.runs(list, chosen)
   const pictures = grpo.live.pictures(host, {open, follow});   pictures.show(answer, picked)
   const log = grpo.live.log(host);   log.add(events), log.clear()
   grpo.live.QUIET   ms after which a run that moves nothing is asked about again */
'use strict';

(() => {
  const { h, text, fill } = grpo;
  const QUIET = 10_000;

  const BUTTONS = [
    { name: 'pause', label: 'Pause', asked: 'Pausing', glyph: 'pause', title: 'Hold the run where it is; the models stay loaded' },
    { name: 'resume', label: 'Resume', asked: 'Resuming', glyph: 'play', kind: 'primary', title: 'Go on' },
    { name: 'stop', label: 'Stop', asked: 'Stopping', glyph: 'stop', kind: 'danger', title: 'Save the policy, end the run and free the devices; it can be resumed' },
    { name: 'save', label: 'Save now', asked: 'Saving', glyph: 'save', title: 'Save the policy after this step' },
    { name: 'evaluate', label: 'Evaluate now', asked: 'Evaluating', glyph: 'check', title: 'Measure the policy on held-out prompts after this step' },
  ];

  class Strip {
    constructor(host, { pick, command }) {
      this.command = command;
      this.pending = {};  // command -> the state it was asked in, until the server tells of it
      this.badge = h('span', { class: 'g-live-badge' });
      this.name = h('h1', {}, '\u00a0');
      this.about = h('span', { class: 'g-quiet g-small' });
      this.like = h('button', { type: 'button', class: 'g-button plain small', title: 'Fill in the Train form with the settings of this run', onclick: () => grpo.go('train', { run: this.state.run.id }) }, 'Train another like it');
      this.picker = h('select', { class: 'g-select', 'aria-label': 'Run shown', onchange: () => pick(this.picker.value), onblur: () => this.drawPicker(this.picker.value) });
      this.list = [];
      this.buttons = Object.fromEntries(BUTTONS.map((spec) => [spec.name, this.button(spec)]));
      this.count = h('span', { class: 'g-live-count' }, '\u00a0');
      this.progress = h('span', { style: { width: '0%' } });
      this.bar = h('div', { class: 'g-bar', role: 'progressbar', 'aria-label': 'Steps done', 'aria-valuemin': 0 }, this.progress);
      this.facts = h('dl', { class: 'g-live-facts' });
      this.fact = Object.fromEntries(['pace', 'time', 'age', 'memory'].map((key) => [key, this.newFact(key)]));
      this.phases = h('ol', { class: 'g-live-phases', 'aria-label': 'Phases' });
      this.remark = h('p', { class: 'g-live-remark', role: 'status' });
      this.headline = h('p', { class: 'g-live-headline', hidden: true });
      this.other = h('p', { class: 'g-live-other', hidden: true });
      this.otherText = h('span');
      this.other.append(this.otherText, h('button', { type: 'button', class: 'g-button plain small', onclick: () => pick(this.otherRun) }, 'Show it'));
      host.append(h('section', { class: 'g-card g-live-strip', 'aria-label': 'The run' },
        h('div', { class: 'g-row' }, this.badge, this.name, this.about, this.like,
          h('div', { class: 'g-row g-push g-live-actions' }, h('span', { class: 'g-live-picker' }, this.picker), BUTTONS.map(({ name }) => this.buttons[name].node))),
        h('div', { class: 'g-live-progress' }, h('div', { class: 'g-live-steps' }, this.count, this.bar), this.facts),
        h('div', { class: 'g-live-now' }, this.phases, this.remark), this.headline, this.other));
    }

    button(spec) {
      const label = h('span', {}, spec.label);
      const node = h('button', { type: 'button', class: ['g-button', spec.kind], disabled: true, data: { command: spec.name } }, grpo.icon(spec.glyph), label);
      node.addEventListener('click', () => {
        const { id, state } = this.state.run;
        this.pending[spec.name] = { id, state };
        this.act();
        grpo.attempt(node, () => this.command(id, spec.name).catch((error) => {
          delete this.pending[spec.name];
          this.act();
          throw error;
        }));
      });
      return { node, label, spec };
    }

    newFact(key) {
      const term = h('dt'), value = h('dd');
      this.facts.append(h('div', { data: { fact: key } }, term, value));
      return { term, value };
    }

    /* `state` is what live/state answers. */
    show(state) {
      this.state = state;
      this.skew = state.now - Date.now() / 1000;
      const { run, pace, times } = state;
      fill(this.badge, grpo.state(run.state));
      text(this.name, run.name);
      text(this.about, `${run.preset ? `${run.preset}, ` : ''}seed ${run.seed}, run ${run.number}${run.source === 'imported' ? ', imported' : ''}`);
      fill(this.count, h('strong', {}, run.step.toLocaleString('en')), ` / ${run.total.toLocaleString('en')} steps`);
      const share = run.total ? (100 * run.step) / run.total : 0;
      this.progress.style.width = `${share}%`;
      this.bar.setAttribute('aria-valuemax', run.total);
      this.bar.setAttribute('aria-valuenow', run.step);
      this.set('pace', 'pace', pace.per_minute ? `${grpo.num(pace.per_minute)} steps a minute` : '\u2013', 'Median of the last 20 steps');
      if (run.active) this.set('time', 'training left', pace.left === null ? '\u2013' : grpo.duration(pace.left), 'At the present pace; evaluations come on top');
      else this.set('time', 'took', times.started && times.finished ? grpo.duration(times.finished - times.started) : '\u2013', 'From the first start to the last end');
      const held = state.memory.map((m) => `${grpo.bytes(m.used)} of ${grpo.bytes(m.total)}`);
      this.set('memory', state.memory.length ? `memory, ${state.memory.map((m) => m.label).join(' / ')}` : 'memory', held.join(' / ') || '\u2013', 'What the process of the run holds');
      fill(this.phases, state.phases.map((part) => h('li', { class: [`g-live-${part.state}`, part.name.length > 24 && 'g-live-long'], title: part.name.length > 24 ? part.name : null, 'aria-current': part.state === 'now' ? 'step' : null },
        h('span', { class: 'g-live-fill', style: { width: `${100 * part.share}%` } }), h('span', { class: 'g-live-part' }, part.name), part.note ? h('span', { class: 'g-quiet' }, part.note) : null)));
      this.phases.hidden = !state.phases.length;
      this.act();
      this.tick();
    }

    set(key, term, value, title) {
      text(this.fact[key].term, term);
      text(this.fact[key].value, value);
      this.fact[key].value.title = title;
    }

    /* What is possible now; what was asked and has not happened yet. */
    act() {
      const { run, actions, asked } = this.state;
      for (const [name, told] of Object.entries(this.pending)) {
        if (told.id !== run.id || told.state !== run.state || (told.known && !asked.includes(name))) delete this.pending[name];
        else if (asked.includes(name)) told.known = true;
      }
      for (const { node, label, spec } of Object.values(this.buttons)) {
        const waits = asked.includes(spec.name) || spec.name in this.pending;
        const whyNot = actions[spec.name];
        text(label, waits ? `${spec.asked}\u2026` : spec.label);
        node.disabled = Boolean(whyNot) || waits;
        node.title = waits ? 'Asked; it happens as soon as the run gets there' : whyNot || spec.title;
      }
      const resumes = !actions.resume || asked.includes('resume') || 'resume' in this.pending;
      this.buttons.resume.node.hidden = !resumes;
      this.buttons.pause.node.hidden = resumes;
    }

    /* Once a second: ages, and whether the run showed signs of life when the app last answered. What it has done since
       is not known here, so nothing is said of it once the app should have answered again. */
    tick() {
      if (!this.state) return;
      const { run, now, times, limits, remark, busy, watched } = this.state;
      const unknown = watched && Date.now() / 1000 + this.skew - now > 2 * QUIET / 1000;
      const ago = (time) => grpo.ago(time - this.skew);
      if (run.active) this.set('age', 'last update', unknown ? '\u2013' : ago(times.updated), 'When the run last recorded anything');
      else this.set('age', 'ended', ago(times.finished || times.updated), grpo.date(times.finished || times.updated));
      const silence = now - (times.heartbeat || times.updated), stillness = now - times.updated;
      let { kind, text: said } = remark;
      const silent = !unknown && watched && silence > limits.silence, still = !unknown && busy && stillness > limits.patience;
      if (silent) said = `No sign of life for ${grpo.duration(silence)}: the process of this run may hang or be frozen.`;
      else if (still) said = `No progress for ${grpo.duration(stillness)}, though the process lives: it may hang. Stop and Resume start it afresh from the last saved step.`;
      if (silent || still) kind = 'warn';
      this.fact.age.value.classList.toggle('g-live-late', silent || still);
      text(this.remark, said);
      this.remark.className = `g-live-remark g-live-${kind}`;
      this.remark.hidden = !said;
    }

    conclude(headline) {
      this.headline.hidden = !headline;
      if (!headline) return;
      const where = { final: '', baseline: '' }[headline.kind] ?? `Validation at step ${headline.step}: `;
      fill(this.headline, h('strong', {}, where, headline.text), ' ',
        h('button', { type: 'button', class: 'g-button plain small', onclick: () => grpo.go('gallery', { run: this.state.run.id }) }, 'Before / after'));
    }

    /* The runs there are. An open list must not change under the hand: it does when it is left. */
    runs(list, chosen) {
      this.list = list;
      if (document.activeElement !== this.picker || this.picker.value !== chosen) this.drawPicker(chosen);
    }

    drawPicker(chosen) {
      fill(this.picker, this.list.map((run) => h('option', { value: run.id }, `${run.number}. ${run.name} (${run.state}${run.source === 'imported' ? ', imported' : ''})`)));
      this.picker.value = chosen;
    }

    /* Another run goes on while this one does not. */
    elsewhere(run) {
      this.other.hidden = !run;
      this.otherRun = run && run.id;
      if (run) text(this.otherText, `${run.name} is ${run.state} now.`);
    }
  }

  class Pictures {
    constructor(host, { open, follow }) {
      this.open = open;
      this.title = h('h2', {}, 'Newest pictures');
      this.follow = h('button', { type: 'button', class: 'g-button plain small g-push', hidden: true, onclick: follow }, 'Newest');
      this.grid = h('div', { class: 'g-live-pairs' });
      this.note = h('p', { class: 'g-quiet g-small g-live-picture-note' });
      host.append(h('section', { class: 'g-card g-live-pictures', 'aria-label': 'Pictures' },
        h('header', {}, this.title, this.follow), this.grid, this.note));
    }

    /* The answer of live/pictures; picked: whether a person chose the step. */
    show({ step, groups, more, note }, picked) {
      this.step = step;
      text(this.title, step ? `Step ${step.toLocaleString('en')}: best and worst` : 'Newest pictures');
      this.follow.hidden = !picked;
      text(this.note, note || (more ? `And ${more} more group${more > 1 ? 's' : ''} below.` : 'Each pair: one prompt, the same latents.'));
      const wanted = JSON.stringify(groups);
      if (wanted === this.shown) return;
      this.shown = wanted;
      this.grid.replaceChildren(...groups.map((group) => this.pair(group)));
    }

    pair(group) {
      const side = (what, row) => (row ? h('figure', {}, grpo.picture(row.picture, `${what} of the group: ${row.rewrite || 'no rewrite'}`, { loading: 'eager', title: row.rewrite }),
        h('figcaption', {}, h('span', { class: 'g-quiet' }, what), h('span', {}, grpo.num(row.reward)))) : null);
      return h('button', { type: 'button', class: 'g-live-pair', title: 'Show this step below', onclick: () => this.open(this.step) },
        h('span', { class: 'g-live-two' }, side('best', group.best), side('worst', group.worst)), h('span', { class: 'g-live-prompt', title: group.prompt }, group.prompt));
    }
  }

  class Log {
    constructor(host) {
      this.list = h('ol', { class: 'g-live-lines', role: 'log', 'aria-label': 'Log of the run', tabindex: '0' });
      host.append(h('section', { class: 'g-card g-live-log' }, h('header', {}, h('h2', {}, 'Log')), this.list));
    }

    /* The newest stands at the bottom, and stays in view unless somebody has scrolled up. */
    add(events) {
      if (!events.length) return;
      const follows = this.list.scrollHeight - this.list.scrollTop - this.list.clientHeight < 30;
      this.list.append(...events.map((event) => h('li', { class: `g-live-${event.level}` },
        h('time', { datetime: new Date(event.time * 1000).toISOString(), title: grpo.date(event.time) }, new Date(event.time * 1000).toLocaleTimeString(undefined, { hour12: false })),
        h('span', { class: 'g-live-kind' }, event.label), h('span', {}, event.message))));
      while (this.list.children.length > 500) this.list.firstChild.remove();
      if (follows) this.list.scrollTop = this.list.scrollHeight;
    }

    clear() { this.list.replaceChildren(); }
  }

  grpo.live = {
    QUIET,
    strip: (host, actions) => new Strip(host, actions),
    pictures: (host, actions) => new Pictures(host, actions),
    log: (host) => new Log(host),
  };
})();
