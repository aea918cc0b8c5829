/* The Before / after screen: which run and measurement, the headline, and the four ways to look at its pictures. */
'use strict';

(() => {
  const { h, fill, gallery } = grpo;
  const { segments, interval, gainText, fixed } = gallery;
  const narrow = matchMedia('(max-width: 1180px)');
  const PATIENCE = 3000;  // ms: how old the list of runs may get while a run goes on
  const PANES = { pictures: 'Pictures', judge: 'Judge beside CLIP', film: 'Over the steps', blind: 'Blind test' };

  /* What is shown. `compare` is the server's name of a comparison: trained_vs_untrained. */
  const now = { run: null, at: null, greedy: false, against: 'untrained', pane: 'pictures', compare: '', overview: null, latent: 0 };
  let runs = [], newest = null;
  let parts = null;
  let seen = '', asked = 0, waiting = null, turn = 0, latest = null, active = false, pinned = false;

  const comparison = () => now.overview.comparisons.find((item) => item.name === now.compare) || null;

  function note(prompt) {
    grpo.note('gallery', { run: now.run, at: now.at, prompt, view: now.pane === 'pictures' ? null : now.pane,
      greedy: now.greedy ? 1 : null, against: now.against === 'original' ? 'original' : null });
  }

  // -- choosing ---------------------------------------------------------------------------------------

  async function list() {
    asked = Date.now();
    const found = await grpo.get('gallery/runs');
    runs = found.runs;
    newest = found.newest;
    const shown = runs.filter((run) => run.measured.length || run.id === now.run);
    const options = shown.map((run) => h('option', { value: run.id }, `${run.name} \u00b7 ${run.id} \u00b7 ${run.source === 'imported' ? 'recorded' : run.state}`));
    const before = [...parts.run.options].map((item) => item.textContent).join('\n');
    if (options.map((item) => item.textContent).join('\n') !== before) parts.run.replaceChildren(...options);
    if (now.run) parts.run.value = now.run;
  }

  /* Load the run's measurement anew; whoever waits for an older load waits for this one. */
  function load() {
    turn += 1;
    latest = arrive(turn);
    return latest;
  }

  async function arrive(mine) {
    if (!now.run) {
      now.overview = null;
      nothing('Nothing to look at yet', runs.length ? 'No run has measured its prompts yet; that is the first thing a run does.'
        : 'A run draws its test prompts before and after training: as they were written, rewritten by the untrained policy, and rewritten by the trained one. They appear here, side by side.');
      return undefined;
    }
    const overview = await grpo.get('gallery/overview', { run: now.run, at: now.at }).catch((error) => {
      if (error.status !== 404) throw error;
      return { at: null, note: error.message };
    });
    if (mine !== turn) return latest;
    now.overview = overview;
    seen = mark();
    if (overview.at === null) {
      nothing('Nothing measured yet', overview.note);
      parts.top.hidden = false;
      return undefined;
    }
    choose();
    render();
    return undefined;
  }

  /* What of the run's measurements and of its state the screen shows. */
  function mark() {
    const run = runs.find((item) => item.id === now.run);
    return run ? JSON.stringify([run.state, run.measured]) : '';
  }

  /* The comparison that fits what is wanted, or else one that there is. */
  function choose() {
    const all = now.overview.comparisons;
    const sampled = (item) => !item.after.endsWith('_greedy');
    if (!all.some((item) => sampled(item) !== now.greedy)) now.greedy = !now.greedy && all.some((item) => !sampled(item));
    const mine = all.filter((item) => sampled(item) !== now.greedy);
    const found = mine.find((item) => item.after.startsWith('trained') && item.before.startsWith(now.against)) || mine[0];
    now.compare = found ? found.name : '';
    now.latent = Math.min(now.latent, Math.max(0, now.overview.latents - 1));
  }

  // -- drawing ----------------------------------------------------------------------------------------

  function nothing(title, text) {
    gallery.blind.hide();
    if (!parts.empty.hidden && parts.empty.dataset.said === text) return;
    parts.empty.dataset.said = text;
    parts.top.hidden = !now.run;
    parts.rest.hidden = true;
    parts.empty.hidden = false;
    fill(parts.empty, grpo.empty(title, text, grpo.button('Start a run', () => grpo.go('train'), { kind: 'primary' })));
  }

  function render() {
    const { overview } = now;
    parts.top.hidden = parts.rest.hidden = false;
    parts.empty.hidden = true;
    const run = runs.find((item) => item.id === now.run);
    const final = run.measured.some((item) => item.kind === 'final');
    const options = run.measured.filter((item) => !(final && item.kind === 'baseline'));
    fill(parts.at, options.map((item) => h('option', { value: item.id }, item.label)));
    parts.at.value = overview.at;
    parts.at.hidden = options.length < 2;
    const both = (test) => overview.comparisons.some(test);
    parts.greedy.hidden = !(both((item) => item.after.endsWith('_greedy')) && both((item) => !item.after.endsWith('_greedy')));
    parts.greedy.choose(now.greedy ? 'greedy' : 'sampled');
    const mine = overview.comparisons.filter((item) => item.after.endsWith('_greedy') === now.greedy && item.after.startsWith('trained'));
    parts.against.hidden = mine.length < 2;
    parts.against.choose(now.against);
    parts.note.hidden = !overview.note;
    grpo.text(parts.note, overview.note);
    headline();
    pane();
  }

  const block = (label, ...children) => h('section', { class: 'g-gallery-block' }, h('h3', {}, label), ...children);

  function gain(label, found, places, confidence) {
    while (found.high - found.low < 5 * 10 ** -places && places < 5) places += 1;  // what rounds to nothing is told finer
    const share = found.percent === null ? null : `${gainText(found.percent, Math.abs(found.percent) < 9.95 ? 1 : 0)} %`;
    return block(label,
      h('p', { class: ['g-gallery-big', found.distinguishable ? '' : 'g-unsure'] }, gainText(found.mean, places), share ? h('small', {}, share) : null),
      interval(found),
      h('p', { class: 'g-small g-quiet' }, `${fixed(found.before, places)} \u2192 ${fixed(found.after, places)} \u00b7 ${grpo.percent(confidence)} interval ${gainText(found.low, places)} to ${gainText(found.high, places)}`),
      found.distinguishable ? null : h('p', {}, h('span', { class: 'g-chip' }, 'not distinguishable from zero')));
  }

  function wins(counts) {
    const part = (kind, word) => h('span', { class: kind, style: { 'flex-grow': counts[kind] }, title: `${counts[kind]} ${word}` });
    const said = (kind, word) => h('li', {}, h('i', { class: kind }), h('b', {}, counts[kind].toLocaleString()), ` ${word}`);
    const known = counts.gained + counts.same + counts.lost;
    return block('Prompts', h('p', { class: 'g-gallery-big' }, `${counts.gained.toLocaleString()}`, h('small', {}, `of ${known.toLocaleString()} gained`)),
      h('div', { class: 'g-gallery-wins', 'aria-hidden': 'true' }, part('gained', 'gained'), part('same', 'same'), part('lost', 'lost')),
      h('ul', { class: 'g-gallery-legend' }, said('gained', 'gained'), said('same', 'same'), said('lost', 'lost')));
  }

  /* What moved inside: reward by tier, and the kinds of attributes that the judge checks one by one. */
  function inside(item) {
    const before = now.overview.arms[item.before], after = now.overview.arms[item.after];
    const row = (label, from, to, show) => h('li', {}, h('span', {}, label), h('span', { class: 'g-number' }, `${show(from)} \u2192 ${show(to)}`));
    const kinds = Object.keys(after.kinds).filter((kind) => kind in before.kinds);
    const tiers = Object.keys(after.tiers).filter((tier) => tier in before.tiers);
    const percent = (value) => Math.round(100 * value);
    if (!tiers.length && !kinds.length) return null;
    return h('details', { class: 'g-gallery-block g-gallery-inside', open: !narrow.matches }, h('summary', {}, 'By tier and attribute'),
      tiers.length ? [h('h3', {}, 'Reward by tier'), h('ul', { class: 'g-gallery-mini' }, tiers.map((tier) => row(tier, before.tiers[tier], after.tiers[tier], (value) => fixed(value, 0))))] : null,
      kinds.length ? [h('h3', {}, 'Attributes right', h('span', { class: 'g-quiet' }, ' %')), h('ul', { class: 'g-gallery-mini' }, kinds.map((kind) => row(kind, before.kinds[kind], after.kinds[kind], percent)))] : null);
  }

  function headline() {
    const item = comparison(), { overview } = now;
    if (!item || !item.reward) {
      const arms = Object.entries(overview.arms).filter(([arm]) => gallery.arms(now.greedy).includes(arm));
      fill(parts.headline, h('div', { class: 'g-gallery-blocks' }, arms.map(([, arm]) => block(arm.label, h('p', { class: 'g-gallery-big' }, fixed(arm.reward, 1), h('small', {}, 'mean reward'))))));
      return;
    }
    const who = `${gallery.name(item.after).toLowerCase()} against ${gallery.name(item.before).toLowerCase()}`;
    const { failures, cut_share: cut } = overview.arms[item.after];
    fill(parts.headline,
      h('div', { class: 'g-gallery-blocks' },
        gain(`Reward gain, ${who}`, item.reward, 1, overview.confidence),
        item.judge ? gain('Judge (0 to 1, never trained on)', item.judge, 2, overview.confidence) : null,
        wins(item.counts), inside(item)),
      h('p', { class: 'g-gallery-sentence' }, item.sentence, ' ',
        h('span', { class: 'g-quiet' }, `${overview.latents} ${overview.latents === 1 ? 'picture' : 'pictures'} each, on shared latents.`,
          cut ? ` ${grpo.percent(cut)} of the ${gallery.name(item.after).toLowerCase()} texts end with words that the image model does not read.` : '',
          failures ? ` ${failures} of ${overview.arms[item.after].pictures} rewrites could not be read and count as failures.` : '')));
  }

  function pane() {
    parts.panes.choose(now.pane);
    for (const [key, part] of Object.entries(parts.bodies)) part.hidden = key !== now.pane;
    const problem = (error) => grpo.toast(error.message, 'error');
    gallery.pictures.show(now, parts.bodies.pictures).catch(problem);  // the order that the large view walks through
    if (now.pane !== 'pictures') gallery[now.pane].show(now, parts.bodies[now.pane]).catch(problem);
    if (now.pane !== 'blind') gallery.blind.hide();
  }

  function pick(changes) {
    Object.assign(now, changes);
    choose();
    note();
    render();
  }

  async function other(changes) {
    Object.assign(now, changes);
    pinned = true;
    note();
    await load();
  }

  grpo.screen('gallery', {
    mount(root) {
      const select = (label, onpick) => h('select', { class: 'g-select', 'aria-label': label, onchange: (event) => onpick(event.target.value).catch((error) => grpo.toast(error.message, 'error')) });
      parts = {
        run: select('Run', (value) => other({ run: value, at: null })),
        at: select('Measurement', (value) => other({ at: Number(value) })),
        greedy: segments('Rewrites', { sampled: 'Sampled', greedy: 'Likeliest' }, 'sampled', (key) => pick({ greedy: key === 'greedy' })),
        against: segments('Compared with', { untrained: 'against untrained', original: 'against original' }, 'untrained', (key) => pick({ against: key })),
        note: h('p', { class: 'g-gallery-note', role: 'status' }),
        headline: h('div', { class: 'g-card g-gallery-headline' }),
        panes: segments('View', PANES, 'pictures', (key) => { now.pane = key; note(); pane(); }),
        empty: h('div', { hidden: true }),
        bodies: Object.fromEntries(Object.keys(PANES).map((key) => [key, h('div', { class: `g-gallery-${key}`, hidden: true })])),
      };
      parts.greedy.title = 'Rewrites drawn at the training temperature, or the likeliest one';
      parts.top = h('div', { class: 'g-gallery-top', hidden: true }, h('div', { class: 'g-gallery-picker' }, parts.run, parts.at), parts.greedy, parts.against);
      parts.rest = h('div', { class: 'g-stack', hidden: true }, parts.note, parts.headline, h('div', { class: 'g-gallery-panes' }, parts.panes), ...Object.values(parts.bodies));
      root.append(h('div', { class: 'g-stack' }, parts.top, parts.empty, parts.rest));
    },

    async show(args) {
      active = true;
      await list();
      if (Object.keys(args).length || !pinned) {
        pinned = Boolean(args.run);
        now.run = args.run || newest;
        now.at = args.at ? Number(args.at) : null;
        now.pane = PANES[args.view] ? args.view : 'pictures';
        now.greedy = args.greedy === '1';
        now.against = args.against === 'original' ? 'original' : 'untrained';
        parts.run.value = now.run;
        if (!runs.some((run) => run.id === now.run)) await list();
      }
      await load();
      note(args.prompt);
      if (args.prompt && now.overview && now.compare) await gallery.open(now, { prompt: args.prompt });
    },

    hide() {
      active = false;
      gallery.blind.hide();
    },

    /* A measurement is recorded just before its run's state moves; names and deletions may come a little late. */
    async change(pulse) {
      const states = JSON.stringify(pulse.active.map((run) => [run.id, run.state]));
      const wait = states === this.states ? PATIENCE - (Date.now() - asked) : 0;
      this.states = states;
      if (wait > 0) {
        waiting = waiting || setTimeout(() => {
          waiting = null;
          if (active) this.refresh().catch(() => {});  // the app does not answer: the header says so
        }, wait);
        return;
      }
      await this.refresh();
    },

    async refresh() {
      await list();
      if (now.run && !runs.some((run) => run.id === now.run)) now.run = null;  // deleted
      if (!now.run) now.run = newest;
      if (!now.run || mark() !== seen) await load();
      else if (now.pane === 'blind' && now.overview && now.overview.at !== null) gallery.blind.refresh();
    },
  });

  gallery.note = note;
})();
