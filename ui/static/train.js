/* Train: choose a preset, settings and prompts; see what a run needs and takes; start it, queue it, sweep.

   What differs from the preset is all that is kept here, and all that is sent. The parts of the screen share `desk`:
   desk.base() and desk.value(name) the preset's and the present value, desk.set(name, value) (null = as the preset),
   desk.take({name: value}) for several at once,
   desk.asked() what every request sends. */
'use strict';

(() => {
  const { h, icon } = grpo;
  const STORED = 'train.draft';
  const state = { preset: null, values: {}, presets: [], problems: { fields: {}, top: [] }, starting: false, token: '', asked: 0, planned: '', plan: null, seen: '' };
  let desk = null, form = null, prompts = null, sweep = null, side = null, root = null, building = null, waiting = null;

  // -- what is asked for ------------------------------------------------------------------------------

  function makeDesk(data) {
    const byName = Object.fromEntries(data.fields.map((field) => [field.name, field]));
    const base = () => state.presets.find((preset) => preset.name === state.preset).values;
    return {
      fields: data.fields, field: (name) => byName[name], base, mostPrompts: data.most_prompts, mostBytes: data.most_bytes,
      value: (name) => (name in state.values ? state.values[name] : base()[name]),
      changed: (name) => name in state.values,
      asked: () => ({ preset: state.preset, values: state.values }),
      sets: (sets) => { data.sets = sets; },
      set(name, value) { this.take({ [name]: value }); },
      take(values) {
        for (const [name, value] of Object.entries(values)) {
          if (value === null || grpo.trainForm.same(byName[name], value, base()[name])) delete state.values[name];
          else state.values[name] = value;
        }
        changed();
      },
    };
  }

  function changed(soon = 300) {
    state.token = grpo.trainToken();
    grpo.remember(STORED, { preset: state.preset, values: state.values });
    draw();
    clearTimeout(waiting);
    waiting = setTimeout(() => check().catch((error) => side.cost({ note: error.message })), soon);
  }

  /* Ask what is wrong and what it takes; true if nothing is wrong, null if the question was asked anew meanwhile. */
  async function check() {
    clearTimeout(waiting);
    state.asked += 1;
    const mine = state.asked;
    let answer;
    try {
      answer = await grpo.post('train/check', desk.asked());
    } catch (error) {
      if (error.status === 0) state.seen = '';  // lost on its way: change() asks again
      throw error;
    }
    if (mine !== state.asked) return null;
    state.problems = answer;
    side.first(answer.first_run);
    judged();
    side.cost(answer.cost);
    sweep.update();
    if (!count()) plan(mine);
    return !count();
  }

  const count = () => Object.keys(state.problems.fields).length + state.problems.top.length;

  function judged() {
    const { fields, top } = state.problems;
    const { problem = '', field = '' } = (state.planned === planKey() && state.plan) || {};
    form.problems(problem && desk.field(field) ? { [field]: problem, ...fields } : fields);
    prompts.show(fields['data.prompts'] || '');
    side.named(fields['recording.name'] || '');
    side.top(top);
    side.update();
  }

  /* What a plan depends on: everything but the run's name. */
  function planKey() {
    const { 'recording.name': ignored, ...values } = state.values;
    return JSON.stringify([state.preset, values]);
  }

  /* Devices and memory; only the imported engine can say. */
  async function plan(mine) {
    if (grpo.pulse.worker.engine !== 'ready') {
      side.placement(null);
      return;
    }
    const key = planKey();
    if (key === state.planned) return;
    try {
      const answer = await grpo.post('train/plan', desk.asked());
      if (mine !== state.asked || answer.state !== 'ready') return;
      state.planned = key;
      state.plan = answer;
      side.placement(answer);
      judged();
    } catch (error) {
      if (mine === state.asked) side.placement({ problem: error.message, models: [], devices: [], notes: [] });
    }
  }

  function draw() {
    form.show(desk.base(), state.values);
    side.summary();
    prompts.show(state.problems.fields['data.prompts'] || '');
    side.update();
  }

  async function choose(name, values = {}) {
    state.preset = name;
    state.values = values;
    side.presets();
    prompts.list(side.sets());
    changed(0);
  }

  // -- starting ---------------------------------------------------------------------------------------

  /* Whether all is fine as it stands now; if not, go there. */
  async function fine() {
    let verdict = null;
    while (verdict === null) verdict = await check();
    if (!verdict) goWrong();
    return verdict;
  }

  /* Go to the first setting that is wrong, from top to bottom. */
  function goWrong() {
    const { fields, top } = state.problems;
    const name = ['recording.name', ...form.order].find((item) => fields[item]) || Object.keys(fields)[0] || (top[0] && top[0].field);
    if (name === 'recording.name') side.focusName();
    else if (name === 'data.prompts') prompts.focus();
    else if (name) form.focus(name);
  }

  async function launch(path, body) {
    state.starting = true;
    side.update();
    try {
      const answer = await grpo.post(path, body);
      grpo.toast(answer.message);
      grpo.go('live', { run: answer.run });
    } finally {
      state.starting = false;
      side.update();
    }
  }

  async function start() {
    if (!await fine()) return;
    try {
      await launch('train/start', { ...desk.asked(), token: state.token });
      state.token = grpo.trainToken();
    } catch (error) {
      if (error.field && desk.field(error.field)) {
        state.problems = { ...state.problems, fields: { ...state.problems.fields, [error.field]: error.message } };
        judged();
        goWrong();
      }
      throw error;
    }
  }

  async function copyCommand() {
    if (!await fine()) return;
    await grpo.copy((await grpo.post('train/command', desk.asked())).command, 'Command');
  }

  async function savePreset() {
    if (!await fine()) return;
    const own = state.presets.find((preset) => preset.name === state.preset).saved;
    const answer = await grpo.trainName('Save as preset', {
      about: 'Everything but the run\u2019s name is kept, as a YAML file that the command line takes too.', name: own ? state.preset : '', verb: 'Save',
      save: (name, overwrite) => grpo.post('train/presets', { ...desk.asked(), name, overwrite }),
    });
    if (!answer) return;
    state.presets = answer.presets;
    const name = state.values['recording.name'];
    await choose(answer.name, name ? { 'recording.name': name } : {});
    grpo.toast(`Preset ${answer.name} is saved.`);
  }

  // -- the screen -------------------------------------------------------------------------------------

  async function build() {
    const data = await grpo.get('train/form');
    state.presets = data.presets;
    const draft = grpo.recall(STORED, null);
    const usable = (name) => state.presets.some((preset) => preset.name === name && preset.values);
    const names = new Set(data.fields.map((field) => field.name));
    state.preset = draft && usable(draft.preset) ? draft.preset : data.default;
    state.values = draft && usable(draft.preset) ? Object.fromEntries(Object.entries(draft.values || {}).filter(([name]) => names.has(name))) : {};
    state.token = grpo.trainToken();
    desk = makeDesk(data);
    form = grpo.trainForm(data.fields, data.methods, (values) => desk.take(values));
    prompts = grpo.trainPrompts(desk);
    sweep = grpo.trainSweep(desk);
    side = grpo.trainSide({ desk, state, data, prompts, sweep, form, choose, start, launch, copyCommand, savePreset, reset, count, refusal: () => (state.planned === planKey() && state.plan && state.plan.problem) || '' });
    root.replaceChildren(side.page);
    side.presets();
    prompts.list(data.sets);
    draw();
    await check();
  }

  async function reset() {
    const name = state.values['recording.name'];
    await choose(state.preset, name ? { 'recording.name': name } : {});
  }

  async function freshen() {
    const data = await grpo.get('train/form');
    state.presets = data.presets;
    if (!state.presets.some((preset) => preset.name === state.preset && preset.values)) state.preset = data.default;
    desk.sets(data.sets);
    side.presets();
    prompts.list(data.sets);
    side.first(data.first_run);
    draw();
    await check();
  }

  async function show(args) {
    if (!building) {
      building = build();
      building.catch(() => { building = null; });
      await building;
    } else {
      await building;
      state.token = grpo.trainToken();
      await freshen();
    }
    if (args.run) {
      const found = await grpo.get('train/run', { run: args.run });
      grpo.note('train', {});
      if (await side.mayDrop('take over the settings of that run', 'Take over')) await choose(found.preset, { ...found.values, ...side.kept() });
    } else if (args.guide) {
      grpo.note('train', {});
      side.guide();
    }
  }

  grpo.screen('train', {
    mount(node) {
      root = node;
      root.append(h('div', { class: 'g-train-wait g-quiet' }, 'Loading the settings'));
    },
    show,
    /* Runs came or went, or the engine is there now: what Start does, what a run takes and where it fits may differ. */
    async change(pulse) {
      if (!side) return;
      side.update();
      const now = JSON.stringify([pulse.worker.engine, pulse.worker.current, pulse.active.map((run) => [run.id, run.state])]);
      if (now === state.seen) return;
      state.seen = now;
      state.planned = '';
      await check();
    },
  });
  grpo.onPulse(() => { if (side) side.update(); });
})();
