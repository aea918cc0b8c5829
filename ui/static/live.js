/* The live screen: one run while it goes on, and after. Its pieces are in live-parts.js, its charts in charts.js. */
'use strict';

(() => {
  const { h } = grpo;
  const { QUIET } = grpo.live;  // heartbeats move no revision, so a page asks for them this often
  const HEIGHT = { reward: 330 };

  const view = {
    root: null, parts: null, charts: {}, visible: false,
    run: '',  // its id; '' until the server has chosen
    turn: 0,  // counts selections: an answer to what was asked in an earlier one is none
    picked: false,  // whether a person chose it
    step: null,  // the step that was clicked, null: the newest
    known: null,  // {step, at, shape} of the curves on screen
    event: 0, pictured: null, fetched: 0, runsKey: '',
  };

  function mount(root) {
    grpo.chart.load().catch(() => undefined);  // while the data is on its way; a chart that needs it tells of a failure
    view.root = root;
    const page = h('div', { class: 'g-stack', hidden: true });
    const none = h('div', { hidden: true }, grpo.empty('Nothing has been trained yet',
      'Here a run is watched: its reward, its pictures, what it is doing now. A guided first run takes about a minute.',
      grpo.button('Start a guided first run', () => grpo.go('train', { guide: 1 }), { kind: 'primary' }),
      grpo.button('Set one up yourself', () => grpo.go('train'))));
    root.append(page, none);
    const top = h('div'), main = h('div', { class: 'g-live-main' }), grid = h('div', { class: 'g-live-charts' }), below = h('div'), tail = h('div');
    const strip = grpo.live.strip(top, { pick, command: (run, command) => grpo.post('live/command', { run, command }).then(update) });
    page.append(top, tools(), main, grid, below, tail);
    const reward = h('div', { class: 'g-live-slot' }), side = h('div', { class: 'g-live-side' });
    main.append(reward, side);
    const pictures = grpo.live.pictures(side, {
      open: (step) => { choose(step); below.scrollIntoView({ behavior: 'smooth', block: 'start' }); },
      follow: () => choose(null),
    });
    view.parts = { page, none, strip, pictures, reward, grid, log: grpo.live.log(tail), microscope: grpo.microscope ? grpo.microscope(below) : null };
    if (view.parts.microscope) {
      view.parts.microscope.onStep = (step) => mark(step);
      view.parts.microscope.onFollow = () => mark(null);
    }
    setInterval(() => {
      if (!view.visible || document.hidden) return;
      strip.tick();
      const wanted = lacking() || (strip.state && strip.state.watched);
      if (!wanted || asking || Date.now() - view.fetched <= QUIET) return;
      update().catch(() => undefined);  // asked again in a second; the header tells of an app that does not answer
    }, 1000);
  }

  /* Whether a question was lost on its way: it is asked again in a while, also where the run does nothing new. */
  function lacking() {
    const { state } = view.parts.strip;
    if (!view.fetched) return true;
    if (!state) return false;  // there is no run
    const { microscope } = view.parts;
    return !view.known || !view.known.shape || !view.pictured || !view.runsKey || Boolean(microscope && microscope.missing());
  }

  function tools() {
    const weight = grpo.recall('smoothing', 0.7);
    const shown = h('output', {}, weight.toFixed(2));
    const slider = h('input', { type: 'range', min: 0, max: 0.99, step: 0.01, value: weight, id: 'g-live-smoothing' });
    slider.addEventListener('input', () => {
      shown.textContent = Number(slider.value).toFixed(2);
      grpo.remember('smoothing', Number(slider.value));
      for (const chart of Object.values(view.charts)) chart.smooth(Number(slider.value));
    });
    view.slider = slider;
    return h('div', { class: 'g-row g-live-tools' }, h('label', { for: 'g-live-smoothing', title: 'Exponential moving average; the unsmoothed curve stays faintly behind it' }, 'Smoothing'), slider, shown,
      h('span', { class: 'g-quiet g-small g-push' }, 'Drag on a chart to zoom, double-click to reset, click a point to see its step below.'));
  }

  // -- which run, which step ----------------------------------------------------------------------------

  function show(args) {
    view.visible = true;
    if (args.run && args.run !== view.run) select(args.run, true);
    else if (args.run) view.picked = true;
    else if (view.picked) address();  // back from another screen
    else select('', false);
    const step = Number.parseInt(args.step, 10);
    if (step > 0 && view.run === args.run) view.wanted = step;
    view.runsKey = '';
    return update();
  }

  function select(run, picked) {
    if (run && run === view.run) return;
    view.turn += 1;
    Object.assign(view, { run, picked, step: null, wanted: null, known: null, event: 0, pictured: null });
    view.parts.log.clear();
    for (const chart of Object.values(view.charts)) if (chart.step !== null) chart.mark(null);
  }

  function pick(run) {
    select(run, true);
    address();
    return grpo.attempt(null, update);
  }

  const address = () => grpo.note('live', { run: view.run, step: view.step });

  /* A step was chosen here; the microscope follows. null: the newest again. */
  function choose(step) {
    const { microscope } = view.parts;
    mark(step);
    if (!microscope) return;
    if (view.step !== null) microscope.show(view.run, view.step);
    else if (microscope.picked) microscope.toggleFollow();
  }

  function mark(step) {
    const last = view.known ? view.known.step : 0;
    view.step = step === null || step === undefined ? null : Math.min(Math.max(1, Math.round(step)), last);
    for (const chart of Object.values(view.charts)) chart.mark(view.step);
    address();
    grpo.attempt(null, pictures);
  }

  // -- what is new --------------------------------------------------------------------------------------

  let asking = null, again = false;

  function update() {
    if (!view.visible) return undefined;
    if (asking) {
      again = true;
      return asking;
    }
    asking = (async () => {
      try {
        do {
          again = false;
          await once();
        } while (again && view.visible);
      } finally {
        asking = null;
      }
    })();
    return asking;
  }

  async function once() {
    const { run, turn, known, event, parts } = view;
    let state;
    try {
      state = await grpo.get('live/state', { run, event, ...known });
    } catch (error) {
      if (error.status !== 404 || !run) throw error;
      if (view.turn !== turn) return;
      grpo.toast(error.message, 'error');  // the run was deleted, or the link is of another database
      select('', false);
      again = true;
      return;
    }
    if (view.turn !== turn) {  // another was picked meanwhile, or this one once more
      again = true;
      return;
    }
    view.fetched = Date.now();
    parts.none.hidden = Boolean(state.run);
    parts.page.hidden = !state.run;
    if (!state.run) return;
    view.run = state.run.id;
    if (!run) address();
    parts.strip.show(state);
    if (state.events.length) view.event = state.events[state.events.length - 1].id;
    parts.log.add(state.events);
    const measured = known && state.events.some((line) => line.kind === 'evaluation');
    if (!known || state.reload || measured) await figures();
    else if (state.points) {
      view.known = { ...known, step: state.step, at: state.at };
      for (const chart of Object.values(view.charts)) chart.extend(state.points);
    }
    if (view.turn !== turn) return;
    if (view.wanted) {
      const step = view.wanted;
      view.wanted = null;
      if (view.known.step) choose(step);
    }
    if (parts.microscope && (!known || known.step !== view.known.step)) parts.microscope.latest(view.run, view.known.step);
    else if (parts.microscope) parts.microscope.load();
    await pictures();
    await runs();
  }

  async function figures() {
    const { run, turn, parts } = view;
    let found;
    try {
      found = await grpo.get('live/figures', { run });
    } catch (error) {
      if (view.turn === turn && view.known) view.known = { ...view.known, shape: '' };  // no figures' shape: asked anew
      throw error;
    }
    if (view.turn !== turn) return;
    view.known = { step: found.step, at: found.at, shape: found.shape };
    for (const { name, title, unit, note, figure } of found.charts) {
      if (!view.charts[name]) view.charts[name] = newChart(name === 'reward' ? parts.reward : parts.grid, name, title, unit, note);
      const chart = view.charts[name];
      grpo.text(chart.node.querySelector('.g-note'), note);
      grpo.text(chart.node.querySelector('.g-unit'), unit);
      chart.figure(figure);
    }
    parts.strip.conclude(found.headline);
  }

  function newChart(host, name, title, unit, note) {
    const chart = grpo.chart(host, { name, title, unit: unit || ' ', note, height: HEIGHT[name] || 240 });
    chart.weight = Number(view.slider.value);
    chart.onStep = (step) => choose(step);
    return chart;
  }

  async function pictures() {
    const { run, step } = view;
    const wanted = `${run} ${step ?? `newest of ${view.known ? view.known.step : 0}`}`;
    if (view.pictured === wanted) return;
    view.pictured = wanted;
    let found;
    try {
      found = await grpo.get('live/pictures', { run, step });
    } catch (error) {
      if (view.pictured === wanted) view.pictured = null;
      throw error;
    }
    if (view.pictured === wanted) view.parts.pictures.show(found, step !== null);
  }

  /* The picker's list, fetched when the runs that go on have changed; and whether another run goes on. */
  async function runs() {
    const { active } = grpo.pulse;
    const state = view.parts.strip.state.run;
    const going = active.find((run) => run.state !== 'queued' && run.id !== view.run);
    view.parts.strip.elsewhere(state.active && state.state !== 'queued' ? null : going);
    const key = JSON.stringify([view.run, state.state, state.name, active.map((run) => [run.id, run.state, run.name])]);
    if (key === view.runsKey) return;
    view.runsKey = key;
    let found;
    try {
      found = await grpo.get('live/runs');
    } catch (error) {
      view.runsKey = '';
      throw error;
    }
    view.parts.strip.runs(found.runs, view.run);
  }

  grpo.screen('live', { mount, show, hide() { view.visible = false; }, change: update });
})();
