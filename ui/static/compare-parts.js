/* What chosen runs gained, which settings differ between them, and one prompt's pictures in all of them.

   grpo.compare.gains(host).show(runs), .settings(host).show(runs), .pictures(host, {onPrompt(id)}).show(runs, prompt) */
'use strict';

(() => {
  const { h } = grpo;
  const COMPARISONS = [
    ['trained_vs_untrained', 'Trained against untrained'], ['trained_greedy_vs_untrained_greedy', 'Trained against untrained, likeliest rewrite'],
    ['trained_vs_original', 'Trained against the original prompt'], ['trained_greedy_vs_original', 'Trained against the original prompt, likeliest rewrite'],
    ['untrained_vs_original', 'Untrained against the original prompt'],
  ];
  grpo.compare = grpo.compare || {};
  const idsOf = (runs) => runs.map(({ id }) => id).join(',');
  const named = (run) => h('span', { class: 'g-compare-name' }, grpo.compare.swatch(run), h('span', { title: run.id }, run.name));

  // -- gains: a point and its interval for each run ---------------------------------------------------

  function ticks(low, high) {
    const raw = (high - low) / 5;
    const unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= raw);
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
    return { found, places: Math.max(0, -Math.floor(Math.log10(step))) };
  }

  class Gains {
    constructor(host) {
      this.of = 'reward';
      this.comparison = h('select', { class: 'g-select', 'aria-label': 'What is compared', onchange: () => this.draw() }, COMPARISONS.map(([value, label]) => h('option', { value }, label)));
      this.kinds = h('span', { class: 'g-segments', role: 'group', 'aria-label': 'Score' }, ['reward', 'judge'].map((kind) => h('button', { type: 'button', data: { kind }, onclick: () => { this.of = kind; this.draw(); } }, kind === 'reward' ? 'Reward' : 'Judge')));
      this.rows = h('div', { class: 'g-compare-forest' });
      this.note = h('p', { class: 'g-quiet g-small' });
      this.host = h('section', { class: 'g-card g-compare-gains', 'aria-label': 'Gains' }, h('header', { class: 'g-compare-bar' }, h('h2', {}, 'Gains'), h('span', { class: 'g-row g-push' }, this.comparison, this.kinds)), this.rows, this.note);
      host.append(this.host);
    }

    show(runs) {
      this.runs = runs;
      this.draw();
    }

    draw() {
      for (const button of this.kinds.children) button.setAttribute('aria-pressed', String(button.dataset.kind === this.of));
      const found = this.runs.map((run) => {
        const gain = run.gains[this.comparison.value];
        return [run, gain && this.of === 'judge' ? gain.judge : gain];
      });
      const shown = JSON.stringify([this.comparison.value, this.of, found.map(([run, gain]) => [run.id, run.name, gain, run.active])]);
      if (shown === this.shown) return;
      this.shown = shown;
      const values = found.flatMap(([, gain]) => (gain ? [gain.mean, gain.low ?? gain.mean, gain.high ?? gain.mean] : []));
      if (!values.length) {
        this.rows.replaceChildren(h('p', { class: 'g-quiet' }, 'None of the chosen runs has this measured. It is, at the end of a run.'));
        grpo.text(this.note, '');
        return;
      }
      const min = Math.min(0, ...values), max = Math.max(0, ...values), room = (max - min || 1) * 0.06;
      const low = min - room, high = max + room;
      const at = (value) => `${(100 * (value - low) / (high - low)).toFixed(2)}%`;
      const axis = ticks(low, high);
      const grid = () => axis.found.map((value) => h('line', { x1: at(value), x2: at(value), y1: 0, y2: '100%', class: value === 0 ? 'g-compare-zero' : 'g-compare-tickline' }));
      const places = this.of === 'judge' ? 3 : 2;
      const row = (...cells) => h('div', { class: 'g-compare-gain' }, cells);
      this.rows.replaceChildren(...found.map(([run, gain]) => {
        const color = grpo.color(run.number);
        if (!gain) return row(named(run), h('span', { class: 'g-faint g-small' }, run.active ? 'measured when the run ends' : 'not measured'), h('span'));
        const text = `${grpo.signed(gain.mean, places)}${gain.low === null ? '' : ` (${grpo.signed(gain.low, places)} to ${grpo.signed(gain.high, places)})`}`;
        const label = `${run.name}: ${text}, ${gain.n} prompts`;
        return row(named(run), h('svg', { class: 'g-compare-strip', role: 'img', 'aria-label': label }, grid(),
          gain.low === null ? null : h('line', { x1: at(gain.low), x2: at(gain.high), y1: '50%', y2: '50%', stroke: color, 'stroke-width': 2 }),
          gain.low === null ? null : [gain.low, gain.high].map((end) => h('line', { x1: at(end), x2: at(end), y1: '32%', y2: '68%', stroke: color, 'stroke-width': 2 })),
          h('circle', { cx: at(gain.mean), cy: '50%', r: 5, fill: color })),
        h('span', { class: 'g-number' }, text, h('span', { class: 'g-faint g-small' }, `, n = ${gain.n}`)));
      }), row(h('span'), h('span', { class: 'g-compare-axis', 'aria-hidden': 'true' }, axis.found.map((value) => h('span', { style: { left: at(value) } }, grpo.signed(value, axis.places)))), h('span')));
      const level = [...new Set(found.map(([run]) => run.confidence).filter(Boolean))].map((value) => grpo.percent(value)).join(' or ');
      grpo.text(this.note, `Mean paired gain of the ${this.of} on held-out prompts with its ${level} interval (bootstrap over prompts). An interval across 0 is no evidence of a gain.`);
    }
  }

  // -- settings that differ ---------------------------------------------------------------------------

  class Settings {
    constructor(host) {
      this.body = h('div', { class: 'g-scroll g-compare-settings' });
      this.note = h('p', { class: 'g-quiet g-small' });
      host.append(h('section', { class: 'g-card', 'aria-label': 'Settings that differ' }, h('header', {}, h('h2', {}, 'Settings that differ')), this.body, this.note));
    }

    async show(runs) {
      const key = JSON.stringify(runs.map(({ id, name }) => [id, name]));
      if (key === this.key) return;
      this.key = key;
      if (runs.length < 2) {
        grpo.fill(this.body, h('p', { class: 'g-quiet' }, 'Choose a second run to see in what they differ.'));
        grpo.text(this.note, '');
        return;
      }
      let told;
      try {
        told = await grpo.get('compare/settings', { runs: idsOf(runs) });
      } catch (error) {
        this.key = null;
        throw error;
      }
      if (key !== this.key) return;
      grpo.fill(this.body, told.rows.length
        ? h('table', { class: 'g-table' }, h('thead', {}, h('tr', {}, h('th', { scope: 'col' }, 'Setting'), runs.map((run) => h('th', { scope: 'col', class: 'g-compare-run' }, named(run))))),
          h('tbody', {}, told.rows.map(({ name, help, values }) => h('tr', {}, h('th', { scope: 'row' }, h('span', { class: 'g-mono' }, name), h('span', { class: 'g-quiet g-small' }, help)), values.map((value) => h('td', { title: value.length > 60 ? value : null }, value.length > 60 ? `${value.slice(0, 59)}\u2026` : value))))))
        : h('p', { class: 'g-quiet' }, 'The chosen runs have the same settings.'));
      grpo.text(this.note, `${told.same} settings are the same.`);
    }
  }

  // -- the same prompt in all runs --------------------------------------------------------------------

  class Pictures {
    constructor(host, { onPrompt }) {
      Object.assign(this, { onPrompt, runs: [], prompts: [], index: 0, greedy: false });
      this.search = h('input', { type: 'search', class: 'g-input', placeholder: 'Search prompts', 'aria-label': 'Search prompts', oninput: () => this.list() });
      this.items = h('div', { class: 'g-compare-prompts', role: 'group', 'aria-label': 'Prompts, those the runs differ most on first' });
      this.items.addEventListener('keydown', (event) => {
        const next = event.key === 'ArrowDown' ? 'nextElementSibling' : event.key === 'ArrowUp' ? 'previousElementSibling' : null;
        const target = next && event.target[next];
        if (!target) return;
        event.preventDefault();
        target.focus();
        target.click();
      });
      this.note = h('p', { class: 'g-quiet g-small' });
      this.title = h('p', { class: 'g-compare-prompt' });
      this.switches = h('div', { class: 'g-row' });
      this.grid = h('div', { class: 'g-scroll' });
      this.empty = h('div', { hidden: true });
      this.content = h('div', { class: 'g-compare-side' }, h('div', { class: 'g-stack g-tight' }, this.search, h('p', { class: 'g-faint g-small' }, 'Number: difference between the runs\u2019 trained rewards'), this.items), h('div', { class: 'g-stack g-compare-shown' }, h('div', { class: 'g-row g-wide' }, this.title, this.switches), this.grid));
      host.append(h('section', { class: 'g-card', 'aria-label': 'The same prompt in all runs' }, h('header', {}, h('h2', {}, 'The same prompt in all runs')), this.note, this.empty, this.content));
    }

    async show(runs, prompt) {
      this.byId = new Map([...(this.byId || []), ...runs.map((run) => [run.id, run])]);  // those left out may stand here a moment longer
      const key = JSON.stringify(runs.map(({ id, name, gains }) => [id, name, gains]));  // asked again when a run was measured
      if (key !== this.key) {
        this.key = key;
        let told;
        try {
          told = await grpo.get('compare/prompts', { runs: idsOf(runs) });
        } catch (error) {
          this.key = null;
          throw error;
        }
        if (key !== this.key) return;
        this.runs = told.runs.map((id) => this.byId.get(id));
        this.prompts = told.prompts;
        const missing = told.left_out.length && told.runs.length ? `Not measured yet, so not shown: ${told.left_out.map((id) => this.byId.get(id).name).join(', ')}.` : '';
        grpo.text(this.note, [told.note, missing].filter(Boolean).join(' '));
        this.content.hidden = !this.prompts.length;
        this.empty.hidden = Boolean(this.prompts.length);
        if (!this.prompts.length) {
          grpo.fill(this.empty, told.runs.length ? grpo.empty('No prompt in common', 'The chosen runs were measured on different prompts. Choose runs of one prompt set.')
            : grpo.empty('Nothing measured yet', 'A run draws held-out prompts before and after its training; they stand here when it has ended.'));
        }
        this.drawn = '';
        this.list();
      }
      if (!this.prompts.length) return;
      const known = this.prompts.some(({ id }) => id === (prompt || this.prompt));
      await this.open(known ? prompt || this.prompt : this.prompts[0].id);
    }

    list() {
      const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = this.prompts.filter(({ prompt, tier }) => words.every((word) => `${prompt}\n${tier}`.toLowerCase().includes(word)));
      this.items.replaceChildren(...found.slice(0, 300).map(({ id, prompt, tier, spread }) => h('button', { type: 'button', class: 'g-compare-item', data: { prompt: id }, 'aria-pressed': String(id === this.prompt), onclick: () => grpo.attempt(null, () => this.open(id)) },
        h('span', {}, prompt), h('span', { class: 'g-faint g-small' }, tier, h('span', { class: 'g-push' }, spread === null ? '' : grpo.num(spread, 3))))),
      found.length > 300 ? h('p', { class: 'g-quiet g-small' }, `and ${found.length - 300} more; search to narrow them down`) : '');
      if (!found.length) this.items.replaceChildren(h('p', { class: 'g-quiet g-small' }, 'No prompt matches.'));
    }

    async open(id) {
      this.prompt = id;
      for (const item of this.items.children) if (item.dataset.prompt) item.setAttribute('aria-pressed', String(item.dataset.prompt === id));
      this.onPrompt(id);
      const wanted = `${id} ${this.key}`;
      if (this.drawn === wanted) return;
      const told = await grpo.get('compare/pictures', { runs: idsOf(this.runs), prompt: id });
      if (wanted !== `${this.prompt} ${this.key}`) return;  // another prompt, or other runs meanwhile
      this.drawn = wanted;
      this.told = told;
      this.draw();
    }

    draw() {
      const { runs, latents } = this.told;
      if (!latents.some(({ index }) => index === this.index)) this.index = latents[0].index;
      const both = runs.some(({ arms }) => arms.trained) && runs.some(({ arms }) => arms.trained_greedy);
      if (!both) this.greedy = !runs.some(({ arms }) => arms.trained);
      grpo.fill(this.title, h('span', { class: 'g-strong' }, runs[0].prompt), ' ', h('span', { class: 'g-chip' }, runs[0].tier));
      const group = (label, options) => h('span', { class: 'g-segments', role: 'group', 'aria-label': label }, options.map(([text, pressed, action]) => h('button', { type: 'button', 'aria-pressed': String(pressed), onclick: action }, text)));
      grpo.fill(this.switches, latents.length > 1 ? group('Latents', latents.map(({ index }) => [`Latents ${index + 1}`, index === this.index, () => { this.index = index; this.draw(); }])) : null,
        both ? group('Rewrite', [['Sampled', !this.greedy, () => { this.greedy = false; this.draw(); }], ['Likeliest', this.greedy, () => { this.greedy = true; this.draw(); }]]) : null);
      const arms = this.greedy ? ['original', 'untrained_greedy', 'trained_greedy'] : ['original', 'untrained', 'trained'];
      const same = latents.find(({ index }) => index === this.index).same;
      const titles = ['Original prompt', 'Untrained rewrite', 'Trained rewrite'];
      const cells = arms.flatMap((arm, row) => {
        const items = runs.map((run) => (run.arms[arm] || []).find(({ index }) => index === this.index));
        const one = runs.length > 1 && same && items.every((item) => item && items[0] && item.rewrite === items[0].rewrite && item.reward === items[0].reward);
        return [h('h3', { class: 'g-compare-arm' }, titles[row], one ? h('span', { class: 'g-quiet g-small' }, ' the same in all runs') : null),
          (one ? items.slice(0, 1) : items).map((item, column) => this.cell(item, runs[column], arm, one))];
      });
      this.grid.replaceChildren(h('div', { class: 'g-compare-matrix', style: { '--n': runs.length } }, runs.map(({ run }) => h('div', { class: 'g-compare-head' }, named(this.byId.get(run)))), cells));
    }

    cell(item, run, arm, one) {
      if (!item) return h('div', { class: 'g-faint g-small' }, 'not measured');
      const name = this.byId.get(run.run).name;
      const words = arm === 'original' ? run.prompt : item.rewrite;
      const alt = `${one ? 'All runs' : name}, ${arm.replace('_', ' ')}: ${words || 'no usable rewrite'}`;
      const text = arm === 'original' ? null : words === null ? h('span', { class: 'g-faint' }, 'no usable rewrite') : grpo.diff(run.prompt, words, item.unread, item.cut);
      const large = () => {
        const box = grpo.dialog(`${name}: ${arm.replace('_', ' ')}`, h('div', { class: 'g-stack' }, grpo.picture(item.image, alt), h('p', {}, words || 'no usable rewrite')));
        box.node.classList.add('g-compare-large');
      };
      return h('figure', { class: 'g-compare-cell' },
        item.image ? h('button', { type: 'button', class: 'g-compare-zoom', 'aria-label': `Enlarge. ${alt}`, onclick: large }, grpo.picture(item.thumbnail || item.image, alt)) : grpo.picture(null),
        h('figcaption', {}, h('span', { class: 'g-row' }, h('span', {}, h('span', { class: 'g-quiet g-small' }, 'reward '), h('span', { class: 'g-strong' }, grpo.num(item.reward, 3))), item.judge === null ? null : h('span', { class: 'g-quiet g-small', title: 'Share of what the judge asked that the picture shows' }, `judge ${grpo.percent(item.judge)}`)), text ? h('span', { class: 'g-small' }, text) : null));
    }
  }

  grpo.compare.gains = (host) => new Gains(host);
  grpo.compare.settings = (host) => new Settings(host);
  grpo.compare.pictures = (host, options) => new Pictures(host, options);
})();
