/* The page of the train screen around its form: preset, first run, and the column with the run itself.

   const side = grpo.trainSide(parts)    side.page is the whole page; its methods show what train.js has learned */
'use strict';

grpo.trainSide = ({ desk, state, data, prompts, sweep, form, choose, start, launch, copyCommand, savePreset, reset, count, refusal }) => {
  const { h, icon } = grpo;
  const FIRST = 'Start the first run';

  // -- above: preset, first run, what does not fit together --------------------------------------------

  const pick = h('select', { class: 'g-select', id: 'g-train-preset', onchange: async () => {
    const wanted = pick.value;
    if (await mayDrop(`switch to the preset ${wanted}`, 'Switch')) await choose(wanted, kept());
    else pick.value = state.preset;
  } });
  const many = h('span', { class: 'g-quiet', role: 'status' });
  const resetAll = grpo.button('Reset all', () => reset(), { kind: 'plain' });
  const alert = h('div', { class: 'g-card g-train-alert', role: 'alert', hidden: true });
  const firstLabel = h('span', {}, FIRST);
  const firstButton = grpo.button(firstLabel, () => launch('train/first', { token: state.token }), { kind: 'primary' });
  const first = h('section', { class: 'g-card g-train-first', 'aria-label': 'First run', hidden: true },
    h('div', { class: 'g-stack g-tight' }, h('h2', {}, 'See GRPO work in about a minute'),
      h('p', { class: 'g-quiet' }, 'A small policy rewrites short prompts, an image model draws every rewrite, and CLIP scores each picture against the original words. '
        + 'You will watch the reward climb as the policy learns from nothing but those scores. '
        + 'At the end each test prompt stands there three times: drawn from the original words, from the untrained rewrite and from the trained one.')),
    h('div', { class: 'g-row' }, firstButton,
      grpo.button('Not now', () => { grpo.remember('train.first', 'dismissed'); first.hidden = true; })));

  const kept = () => (state.values['recording.name'] ? { 'recording.name': state.values['recording.name'] } : {});
  const changes = () => Object.keys(state.values).filter((name) => name !== 'recording.name');

  /* Whether the changes made here may go; asked only where there are some. */
  async function mayDrop(doing, verb) {
    const many = changes().length;
    return !many || grpo.confirm(`${many === 1 ? 'One change is' : `${many} changes are`} dropped when you ${doing}.`, verb);
  }

  /* Somebody asked for the guided first run: it is offered again, whatever was said of it before. */
  function guide() {
    grpo.remember('train.first', '');
    first.hidden = false;
    firstButton.focus();
  }

  function presets() {
    const options = (saved) => state.presets.filter((preset) => preset.saved === saved).map((preset) => h('option', { value: preset.name, disabled: !preset.values, title: preset.problem || null },
      preset.values ? preset.name : `${preset.name} (can't be read)`));
    const own = state.presets.some((preset) => preset.saved);
    grpo.fill(pick, h('optgroup', { label: 'Come with the program' }, options(false)), own ? h('optgroup', { label: 'Saved here' }, options(true)) : null);
    pick.value = state.preset;
  }

  function top(problems) {
    alert.hidden = problems.length === 0;
    grpo.fill(alert, problems.map(({ sentence, field }) => h('p', { class: 'g-row' }, h('span', {}, sentence),
      desk.field(field) ? h('button', { type: 'button', class: 'g-button plain small', onclick: () => form.focus(field) }, `Show ${desk.field(field).label}`) : null)));
  }

  // -- the column of the run ---------------------------------------------------------------------------

  const name = h('input', { class: 'g-input', id: 'g-train-name-of-run', maxlength: '120', placeholder: 'made from its number', autocomplete: 'off', 'aria-describedby': 'g-train-name-of-run-error', oninput: () => desk.set('recording.name', name.value) });
  const nameError = h('p', { class: 'g-error', id: 'g-train-name-of-run-error', hidden: true });
  const list = h('ul', { class: 'g-train-changes' });
  const where = h('div', { class: 'g-train-placement' });
  const total = h('span', { class: 'g-train-total' });
  const parts = h('span', { class: 'g-quiet g-small' });
  const note = h('p', { class: 'g-faint g-small' });
  const startLabel = h('span', {}, 'Start');
  const startButton = h('button', { type: 'button', class: 'g-button primary g-train-start', onclick: (event) => { if (event.detail < 2) grpo.attempt(startButton, start); } }, icon('play'), startLabel);
  const why = h('p', { class: 'g-small g-quiet g-train-why', role: 'status' });
  const section = (title, ...content) => h('section', { class: 'g-stack g-tight', 'aria-label': title }, h('h3', {}, title), content);

  const aside = h('aside', { class: 'g-card g-train-side', 'aria-label': 'The run' },
    h('div', { class: 'g-train-scroll' },
      h('div', { class: 'g-field' }, h('label', { for: 'g-train-name-of-run' }, 'Run name'), name, nameError),
      section('Changed from the preset', list), h('hr', { class: 'g-rule' }), prompts.node, h('hr', { class: 'g-rule' }), section('Placement and memory', where)),
    h('div', { class: 'g-train-foot' },
      h('div', { class: 'g-train-cost' }, h('div', { class: 'g-row' }, total, parts), note),
      startButton, why,
      h('div', { class: 'g-row' }, grpo.button('Copy as command', copyCommand, { kind: 'small', glyph: 'copy' }), grpo.button('Save as preset', savePreset, { kind: 'small', glyph: 'save' }))));

  const page = h('div', { class: 'g-stack' }, first,
    h('div', { class: 'g-train-page' },
      h('div', { class: 'g-stack' },
        h('div', { class: 'g-row g-train-bar' }, h('label', { for: 'g-train-preset' }, 'Preset'), pick, many, resetAll), alert, form.groups, sweep.node, form.rest),
      aside));

  function summary() {
    const changed = changes();
    grpo.text(many, changed.length === 0 ? 'As it is' : changed.length === 1 ? '1 change' : `${changed.length} changes`);
    resetAll.hidden = changed.length === 0;
    if (name.value !== (desk.value('recording.name') || '')) name.value = desk.value('recording.name') || '';
    const items = changed.map((key) => {
      const field = desk.field(key);
      const [from, to] = [grpo.trainForm.text(field, desk.base()[key]), grpo.trainForm.text(field, state.values[key])];
      return h('li', { 'aria-label': `${field.label}: ${from} becomes ${to}` },
        h('span', { class: 'g-train-key', title: field.name }, field.label),
        h('span', { class: 'g-train-from' }, from), h('span', { 'aria-hidden': 'true' }, '\u2192'), h('span', { class: 'g-strong' }, to),
        h('button', { type: 'button', class: 'g-icon', 'aria-label': `${field.label} back to ${from}`, title: `Back to ${from}`, onclick: () => desk.set(key, null) }, icon('close')));
    });
    const key = JSON.stringify([state.preset, state.values]);
    if (list.dataset.key === key) return;  // its buttons keep the focus
    list.dataset.key = key;
    list.replaceChildren(...(items.length ? items : [h('li', { class: 'g-quiet' }, 'Nothing: the preset as it is.')]));
  }

  function named(sentence) {
    grpo.text(nameError, sentence);
    nameError.hidden = !sentence;
    if (sentence) name.setAttribute('aria-invalid', 'true');
    else name.removeAttribute('aria-invalid');
  }

  function cost(found) {
    const known = found && found.step !== null && found.step !== undefined;
    grpo.text(total, known && found.total !== null ? `about ${grpo.duration(found.total)}` : known ? `${grpo.duration(found.training)} of training` : 'Time not known yet');
    total.classList.toggle('g-train-unknown', !known);
    const steps = Number(desk.value('training.steps'));
    const more = known && found.total !== null ? `, evaluations ${grpo.duration(found.evaluating)}${found.loading >= 1 ? `, loading ${grpo.duration(found.loading)}` : ''}` : '';
    grpo.text(parts, known ? `${steps.toLocaleString()} steps of ${seconds(found.step)}${more}` : '');
    grpo.text(note, found ? found.note : 'Correct the marked settings to see it.');
  }

  const seconds = (value) => (value < 10 ? `${value.toFixed(value < 1 ? 2 : 1)} s` : grpo.duration(value));

  function placement(found) {
    const { engine, imported, imports, problem } = grpo.pulse.worker;
    if (!found) {
      grpo.fill(where, h('p', { class: 'g-quiet' }, engine === 'failed' ? problem : `Loading the engine (${imported}/${imports}); devices and memory show then.`));
      return;
    }
    const rows = found.models.map((row) => h('tr', {}, h('th', { scope: 'row' }, row.model, h('span', { class: 'g-faint g-train-path', title: row.path }, row.path)), h('td', {}, row.device),
      h('td', { class: 'g-number' }, row.needed === null ? 'not known' : grpo.bytes(row.needed))));
    const bars = found.devices.map((device) => {
      const share = device.free ? Math.min(1, device.needed / device.free) : 0;
      const there = device.free === null ? 'not on this machine' : `of ${grpo.bytes(device.free)} free`;
      const verdict = device.fits === false ? (device.free === null ? '' : ', too little') : device.fits === true ? ', fits' : '';
      return h('div', { class: ['g-train-device', device.fits === false && 'g-train-short'] },
        h('div', { class: 'g-row' }, h('span', { class: 'g-strong' }, device.device), h('span', { class: 'g-quiet' }, `${device.at_least ? 'at least ' : ''}${grpo.bytes(device.needed)} ${there}${verdict}`)),
        h('div', { class: 'g-bar', 'aria-hidden': 'true' }, h('span', { style: { width: `${Math.max(1, 100 * share)}%` } })));
    });
    grpo.fill(where,
      found.problem ? h('p', { class: 'g-error', role: 'alert' }, found.problem, desk.field(found.field) ? h('button', { type: 'button', class: 'g-button plain small', onclick: () => form.focus(found.field) || prompts.focus() }, `Show ${desk.field(found.field).label}`) : null) : null,
      rows.length ? h('table', { class: 'g-table g-train-models' }, h('thead', {}, h('tr', {}, h('th', { scope: 'col' }, 'Model'), h('th', { scope: 'col' }, 'Device'), h('th', { scope: 'col', class: 'g-number' }, 'Memory'))), h('tbody', {}, rows)) : null,
      bars, found.notes.map((line) => h('p', { class: 'g-faint g-small' }, line)));
  }

  /* What Start does now, or why it can't. */
  function update() {
    const { worker, active } = grpo.pulse;
    const called = (id) => (active.find((run) => run.id === id) || { name: 'another run' }).name;
    const mine = [worker.current, ...worker.queue].filter(Boolean);
    const others = active.filter((run) => run.state !== 'queued' && !mine.includes(run.id));
    const behind = mine.length ? called(mine[mine.length - 1]) : '';
    startButton.disabled = worker.engine === 'failed';
    const wrong = count();
    const starting = worker.engine === 'loading' ? `Starting: loading the engine ${worker.imported}/${worker.imports}` : 'Starting';
    grpo.text(firstLabel, state.starting ? starting : FIRST);
    if (state.starting) grpo.text(startLabel, starting);
    else grpo.text(startLabel, behind ? `Queue behind ${behind}` : 'Start');
    if (worker.engine === 'failed') grpo.text(why, worker.problem);
    else if (wrong) grpo.text(why, `${wrong === 1 ? 'One setting needs' : `${wrong} settings need`} a correction first.`);
    else if (refusal()) grpo.text(why, 'It can\u2019t start like this: see Placement and memory.');
    else if (behind) grpo.text(why, `${mine.length === 1 ? 'One run is' : `${mine.length} runs are`} ahead of it.`);
    else if (others.length) grpo.text(why, `${others[0].name} goes on in another process; both would share this machine.`);
    else if (worker.engine === 'loading') grpo.text(why, `The engine is loading (${worker.imported}/${worker.imports}); Start works already.`);
    else grpo.text(why, 'No other run goes on here.');
    if (worker.engine !== 'ready') placement(null);
  }

  return {
    page, presets, top, named, cost, placement, summary, update, kept, mayDrop, guide,
    sets: () => data.sets,
    first: (offered) => { first.hidden = !offered || grpo.recall('train.first', '') === 'dismissed'; },
    focusName: () => name.focus(),
  };
};
