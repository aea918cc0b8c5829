/* The compare screen: which runs are chosen, and everything that follows from it. */
'use strict';

(() => {
  const { h } = grpo;
  const AT_FIRST = 3;  // runs chosen when the address names none
  const MOST = 100;

  let rows = new Map();  // id -> row
  let order = [];  // ids, newest first
  let version = '';
  let chosen = null;  // ids; null until the first look
  let prompt = '';
  let parts = null;
  let asking = null;

  const prepare = () => grpo.chart.load().catch(() => undefined);  // before the data is there; a chart that needs it tells of a failure
  if (location.hash.startsWith('#compare')) prepare();

  const picked = () => chosen.map((id) => rows.get(id));

  /* What changed since the last look, into `rows`; runs that are gone leave the choice. */
  async function look() {
    if (asking) return asking;
    asking = (async () => {
      const told = await grpo.get('compare/runs', { since: version });
      version = told.version;
      const there = new Set(told.ids);
      const gone = [...rows.values()].filter(({ id }) => !there.has(id));
      rows = new Map([...rows].filter(([id]) => there.has(id)));
      for (const run of told.runs) rows.set(run.id, run);
      order = told.ids;
      const lost = chosen ? gone.filter(({ id }) => chosen.includes(id)) : [];
      if (lost.length) grpo.toast(`${lost.map((run) => run.name).join(', ')} ${lost.length === 1 ? 'was' : 'were'} deleted.`);
      if (chosen) chosen = chosen.filter((id) => there.has(id));
    })().finally(() => { asking = null; });
    return asking;
  }

  function note() {
    const now = { runs: chosen.length ? chosen.join(',') : 'none', prompt: chosen.length ? prompt : '' };
    const { screen, args } = grpo.where();
    if (screen !== 'compare' || args.runs !== now.runs || (args.prompt || '') !== now.prompt) grpo.note('compare', now);
  }

  /* Everything on screen from what is known; parts ask for what they lack, the curves first. */
  async function draw() {
    parts.empty.hidden = order.length > 0;
    parts.content.hidden = !order.length;
    if (!order.length) return;
    parts.table.update(rows, order);
    parts.table.choose(chosen);
    parts.strip(picked());
    parts.results.hidden = !chosen.length;
    parts.hint.hidden = chosen.length > 0;
    note();
    if (!chosen.length) return;
    const runs = picked();
    parts.gains.show(runs);
    try {
      await parts.curves.show(runs);
      await Promise.all([parts.settings.show(runs), parts.pictures.show(runs, prompt)]);
    } catch (error) {
      if (error.status !== 404) throw error;  // a run was deleted a moment ago: the next look leaves it out
      await look();
    }
  }

  async function refresh() {
    await look();
    return begin();
  }

  async function begin() {
    if (chosen === null) choose(order.filter((id) => rows.get(id).step > 0).slice(0, AT_FIRST));
    return draw();
  }

  function choose(ids) {
    const numbered = ids.filter((id) => rows.has(id)).sort((a, b) => rows.get(a).number - rows.get(b).number);
    if (numbered.length > MOST) grpo.toast(`At most ${MOST} runs are compared at once.`);
    chosen = numbered.slice(0, MOST);
  }

  function mount(root) {
    prepare();
    const empty = h('div', { hidden: true }, grpo.empty('No runs yet', 'Start two runs that differ in one setting; their curves, gains and pictures stand here side by side.',
      grpo.button('Set up a run', () => grpo.go('train'), { kind: 'primary' })));
    const content = h('div', { class: 'g-stack' });
    const table = grpo.compare.table(content, {
      onChoose: (ids) => grpo.attempt(null, () => { choose(ids); return draw(); }),
      onChange: refresh,
    });
    const chips = h('div', { class: 'g-compare-strip-bar g-row', role: 'group', 'aria-label': 'Chosen runs' });
    const hint = h('div', { class: 'g-card', hidden: true }, grpo.empty('Choose runs to compare', 'Tick two or more runs in the table: their curves, gains, settings and pictures appear here.'));
    const results = h('div', { class: 'g-stack' }, chips);
    let shown = '';
    const strip = (runs) => {
      const now = JSON.stringify(runs.map(({ id, name, number }) => [id, name, number]));
      if (now === shown) return;
      shown = now;
      chips.replaceChildren(...runs.map((run) => h('span', { class: 'g-chip g-compare-chip' }, grpo.compare.swatch(run), h('span', { class: 'g-compare-cut', title: run.name }, run.name),
        h('button', { type: 'button', class: 'g-icon', 'aria-label': `Leave out ${run.name}`, onclick: () => grpo.attempt(null, () => { choose(chosen.filter((id) => id !== run.id)); return draw(); }) }, grpo.icon('close')))));
    };
    const curves = grpo.compare.curves(results);
    const pair = h('div', { class: 'g-grid g-compare-pair' });
    results.append(pair);
    const gains = grpo.compare.gains(pair), settings = grpo.compare.settings(pair);
    const pictures = grpo.compare.pictures(results, { onPrompt: (id) => { prompt = id; note(); } });
    content.append(hint, results);
    root.append(empty, content);
    parts = { empty, content, table, strip, hint, results, curves, gains, settings, pictures };
  }

  grpo.screen('compare', {
    mount,
    async show(args) {
      await look();
      if (args.runs !== undefined) {
        const ids = args.runs.split(',').filter((id) => id && id !== 'none');
        const strange = ids.filter((id) => !rows.has(id));
        if (strange.length) grpo.toast(`There is no run ${strange[0].slice(0, 60)} here${strange.length > 1 ? `, nor ${strange.length - 1} more that the address names` : ''}.`, 'error');
        choose(ids);
        prompt = args.prompt || '';
      }
      return begin();
    },
    change: refresh,
  });
})();
