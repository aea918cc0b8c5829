/* The playground: the prompt, what shall rewrite it, and how it is drawn. What comes of it: playground-tries.js. */
'use strict';

grpo.screen('playground', (() => {
  const { h, fill } = grpo;
  const SHOWN = 5;  // examples at a time
  const PATIENCE = 5000;  // ms: how old the choices may get while a run goes on
  const ORIGINAL = { kind: 'original' }, UNTRAINED = { kind: 'untrained' };
  const form = { prompt: '', models: '', columns: null, latent: '1', pictures: 2, greedy: false, sample: '1', temperature: '' };
  let choices = { models: [], runs: [], most_columns: 6 };
  let examples = { of: null, prompts: [], first: 0 };
  let asked = 0;  // when the choices were last asked for
  let waiting = null;  // the look that is still to come
  let prepared = 0;
  const at = {};  // the form's elements

  // -- columns ----------------------------------------------------------------------------------------

  const code = (column) => (column.kind === 'checkpoint' ? `${column.run}:${column.which}` : column.kind);

  function decode(text) {
    if (text === 'original' || text === 'untrained') return { kind: text };
    const [run, which = 'last'] = text.split(':');
    return run && /^(last|best|\d{1,12})$/.test(which) ? { kind: 'checkpoint', run, which } : null;
  }

  const runOf = (column) => choices.runs.find((run) => run.id === column.run);

  function label(column) {
    if (column.kind === 'original') return 'No rewriting';
    if (column.kind === 'untrained') return 'Untrained policy';
    const run = runOf(column);
    const saved = run && run.checkpoints.find((item) => item.which === column.which);
    const which = saved ? saved.label : /^\d/.test(column.which) ? `step ${column.which}` : column.which;
    return `${run ? run.name : column.run}, ${which}`;
  }

  /* The models chosen; a run that is no entry of its own stands for the entry it draws like. */
  function chosenModels() {
    const entry = (id) => choices.models.find((models) => models.id === id);
    const run = choices.runs.find((item) => item.id === form.models);
    return entry(form.models) || (run && entry(run.models)) || choices.models[0];
  }

  /* Why a column can't be drawn with the models chosen; empty if it can. */
  function unfit(column) {
    if (column.kind !== 'checkpoint') return '';
    const run = runOf(column);
    if (!run) return 'This run has no checkpoint any more.';
    if (run.problem) return run.problem;
    const models = chosenModels();
    return models && run.policy !== models.policy ? 'This run trains another policy model than the one chosen.' : '';
  }

  function startingColumns() {
    const run = choices.runs.find((item) => item.checkpoints.length && !item.problem);
    if (run && form.models === '') form.models = run.models;
    return run ? [ORIGINAL, UNTRAINED, { kind: 'checkpoint', run: run.id, which: 'last' }] : [ORIGINAL, UNTRAINED];
  }

  function add(column) {
    if (!column || form.columns.length >= choices.most_columns || form.columns.some((item) => code(item) === code(column))) return;
    form.columns.push(column);
    drawColumns();
    note();
  }

  function drawColumns() {
    drawAdd();
    const told = JSON.stringify(form.columns.map((column) => [label(column), unfit(column)]));
    if (told === at.told) return;  // whoever is about to remove one keeps the focus
    at.told = told;
    fill(at.chips, form.columns.map((column) => {
      const problem = unfit(column), run = runOf(column);
      return h('span', { class: ['g-chip', 'g-playground-chip', problem && 'g-playground-unfit'], title: problem || undefined },
        run ? h('span', { class: 'g-playground-dot', style: { background: grpo.color(run.number) } }) : null,
        problem ? `${label(column)} (can't be used)` : label(column),
        h('button', {
          type: 'button', class: 'g-playground-remove', 'aria-label': `Remove ${label(column)}`,
          onclick: () => { form.columns = form.columns.filter((item) => item !== column); drawColumns(); note(); at.add.focus(); },
        }, grpo.icon('close')));
    }));
  }

  function drawAdd() {
    if (document.activeElement === at.add) return;  // an open list must not change under the hand
    const free = (column) => !form.columns.some((item) => code(item) === code(column));
    const option = (column, name) => (free(column) ? h('option', { value: code(column) }, name) : null);
    const full = form.columns.length >= choices.most_columns;
    at.add.disabled = full;
    fill(at.add, h('option', { value: '' }, full ? `${choices.most_columns} columns at most` : 'Add a column'), option(ORIGINAL, 'No rewriting'), option(UNTRAINED, 'Untrained policy'),
      choices.runs.map((run) => {
        const problem = unfit({ kind: 'checkpoint', run: run.id });
        const items = run.checkpoints.map((item) => option({ kind: 'checkpoint', run: run.id, which: item.which }, `${run.name}, ${item.label}`));
        return h('optgroup', { label: problem ? `${run.name}: ${problem}` : run.name, disabled: Boolean(problem) }, items);
      }));
    at.add.value = '';
  }

  function drawModels() {
    const models = chosenModels();
    if (!models) return;
    form.models = models.id;
    if (document.activeElement !== at.models) {
      fill(at.models, choices.models.map((item) => h('option', { value: item.id }, item.label)));
      at.models.value = form.models;
    }
    if (examples.of !== form.models) askExamples();
  }

  async function askExamples() {
    const wanted = form.models;
    examples = { of: wanted, prompts: [], first: 0 };
    let found;
    try {
      found = await grpo.get('playground/examples', { models: wanted });
    } catch {
      if (examples.of === wanted) examples.of = null;  // asked again with the next choices
      return;
    }
    if (examples.of !== wanted) return;
    examples.prompts = found.prompts;
    drawExamples(found.note);
  }

  function drawExamples(problem) {
    const { prompts, first } = examples;
    const some = prompts.slice(first, first + SHOWN);
    fill(at.examples, problem ? h('span', { class: 'g-quiet g-small' }, problem) : null,
      some.map((prompt) => h('button', {
        type: 'button', class: 'g-chip g-playground-example', title: prompt,
        onclick: () => { setPrompt(prompt); at.prompt.focus(); prepare(); },
      }, prompt)),
      prompts.length > SHOWN ? h('button', {
        type: 'button', class: 'g-button plain small',
        onclick: () => { examples.first = first + SHOWN < prompts.length ? first + SHOWN : 0; drawExamples(''); at.examples.lastChild.focus(); },
      }, 'Others') : null);
  }

  /* What can be chosen; unless forced, not too often, but never without a look at the last change. */
  async function askChoices(force) {
    const wait = force ? 0 : PATIENCE - (Date.now() - asked);
    if (wait > 0) {
      waiting = waiting || setTimeout(() => {
        askChoices(true).catch(() => undefined);  // the app does not answer: the header says so
      }, wait);
      return;
    }
    clearTimeout(waiting);
    waiting = null;
    asked = Date.now();
    choices = await grpo.get('playground/choices');
    if (!form.columns) form.columns = startingColumns();
    drawModels();
    drawColumns();
  }

  // -- the form ---------------------------------------------------------------------------------------

  function setPrompt(prompt) {
    form.prompt = prompt;
    at.prompt.value = prompt;
    complain('');
    note();
  }

  function complain(sentence, field) {
    const own = field === 'prompt';
    at.prompt.toggleAttribute('aria-invalid', false);
    if (sentence && own) at.prompt.setAttribute('aria-invalid', 'true');
    grpo.text(at.error, sentence);
  }

  /* Somebody is about to ask: the libraries can load meanwhile. */
  function prepare() {
    if (Date.now() - prepared < 60000) return;
    prepared = Date.now();
    grpo.post('playground/prepare').catch(() => { prepared = 0; });
  }

  function note() {
    if (!form.columns) return;
    grpo.note('playground', {
      prompt: form.prompt, models: form.models || 'embedded', columns: form.columns.map(code).join(','), latent: form.latent, pictures: form.pictures,
      sample: form.greedy ? 'greedy' : form.sample, temperature: form.temperature,
    });
  }

  /* Bring the form to what an address says; `run` alone asks for that run's last checkpoint. */
  function restore(args) {
    if (args.prompt !== undefined) form.prompt = args.prompt;
    if (args.models !== undefined) form.models = args.models === 'embedded' ? '' : args.models;
    if (args.columns) form.columns = args.columns.split(',').map(decode).filter(Boolean).slice(0, choices.most_columns);
    if (/^\d{1,19}$/.test(args.latent || '')) form.latent = args.latent;
    if (/^[1-4]$/.test(args.pictures || '')) form.pictures = Number(args.pictures);
    if (args.sample === 'greedy') form.greedy = true;
    else if (/^\d{1,19}$/.test(args.sample || '')) [form.sample, form.greedy] = [args.sample, false];
    if (args.temperature !== undefined) form.temperature = args.temperature;
    if (args.run) {
      const run = choices.runs.find((item) => item.id === args.run);
      form.columns = [ORIGINAL, UNTRAINED, { kind: 'checkpoint', run: args.run, which: 'last' }];
      if (run && run.models !== undefined) form.models = run.models;
    }
    showForm();
  }

  function showForm() {
    at.prompt.value = form.prompt;
    at.latent.value = form.latent;
    at.sample.value = form.sample;
    at.temperature.value = form.temperature;
    at.sampling.classList.toggle('g-playground-off', form.greedy);
    at.sample.disabled = at.temperature.disabled = at.dice.disabled = form.greedy;
    for (const button of at.pictures.children) button.setAttribute('aria-pressed', String(Number(button.textContent) === form.pictures));
    for (const button of at.greedy.children) button.setAttribute('aria-pressed', String((button.textContent === 'Likeliest') === form.greedy));
    if (form.columns) {
      drawModels();
      drawColumns();
    }
  }

  const seed = (text) => (/^\d{1,19}$/.test(text.trim()) ? text.trim() : null);

  async function generate() {
    complain('');
    const latent = seed(at.latent.value), sample = seed(at.sample.value);
    const warm = at.temperature.value.trim() === '' ? null : Number(at.temperature.value);
    if (latent === null || sample === null) return complain('A seed is a whole number from 0 on, of at most 19 digits.');
    if (warm !== null && !(warm > 0 && warm <= 10)) return complain('The temperature is a number above 0 and at most 10, or empty: as each run was trained.');
    if (!form.columns || !form.columns.length) return complain('Choose at least one column.');
    const models = chosenModels();
    const body = {
      prompt: form.prompt, models: form.models, columns: form.columns.map((column) => ({ ...column })), latent_seed: latent,
      pictures: form.pictures, sample_seed: sample, greedy: form.greedy, temperature: form.greedy ? null : warm,
    };
    try {
      const { job, prompt } = await grpo.post('playground/generate', body);
      const described = form.columns.map((column) => ({ name: label(column), number: (runOf(column) || {}).number, ...column }));
      grpo.tries.add(at.tries, { job, body: { ...body, prompt }, columns: described, models, again });
      at.empty.hidden = true;
    } catch (error) {
      if (!(error instanceof grpo.Failure) || error.status === 0) throw error;
      complain(error.message, error.field);
      if (error.field === 'prompt') at.prompt.focus();
    }
    return undefined;
  }

  /* Take a try's settings over into the form. */
  function again(body) {
    Object.assign(form, {
      prompt: body.prompt, models: body.models, columns: body.columns.filter((column) => column.kind !== 'edited'), latent: body.latent_seed,
      pictures: body.pictures, greedy: body.greedy, sample: body.sample_seed, temperature: body.temperature === null ? '' : String(body.temperature),
    });
    showForm();
    note();
    at.prompt.focus();
    at.prompt.scrollIntoView({ block: 'center' });
  }

  const random = () => String(Math.floor(Math.random() * 1e6));

  function dice(name, input, key) {
    const dots = [[5.5, 5.5], [10.5, 5.5], [8, 8], [5.5, 10.5], [10.5, 10.5]].map(([cx, cy]) => h('circle', { cx, cy, r: 0.6 }));
    return h('button', {
      type: 'button', class: 'g-icon g-playground-dice', 'aria-label': name, title: name,
      onclick: () => { form[key] = random(); input.value = form[key]; note(); },
    }, h('svg', { viewBox: '0 0 16 16', class: 'g-svg', 'aria-hidden': 'true' }, h('rect', { x: 2.5, y: 2.5, width: 11, height: 11, rx: 2 }), dots));
  }

  function segments(name, labels, choose) {
    return h('div', { class: 'g-segments', role: 'group', 'aria-label': name }, labels.map((text) => h('button', {
      type: 'button', 'aria-pressed': 'false', onclick: () => { choose(text); showForm(); note(); },
    }, text)));
  }

  function input(id, key, attributes) {
    return h('input', { id: `g-playground-${id}`, class: 'g-input', autocomplete: 'off', onchange: (event) => { form[key] = event.target.value.trim(); note(); }, ...attributes });
  }

  const field = (id, name, help, ...content) => h('div', { class: 'g-field' }, h('label', { for: `g-playground-${id}`, title: help }, name), h('div', { class: 'g-playground-pair' }, content));

  function build(root) {
    at.prompt = h('textarea', {
      id: 'g-playground-prompt', class: 'g-input g-playground-prompt', rows: 2, maxlength: 20000, placeholder: 'What shall be drawn?', spellcheck: 'false',
      oninput: () => { form.prompt = at.prompt.value; complain(''); prepare(); }, onchange: note,
    });
    at.go = grpo.button('Generate', generate, { kind: 'primary', title: 'Ctrl or Command + Enter' });
    at.examples = h('div', { class: 'g-row g-playground-examples' });
    at.error = h('p', { class: 'g-bad-text', role: 'alert' });
    at.chips = h('div', { class: 'g-row' });
    at.add = h('select', {
      class: 'g-select g-playground-add', 'aria-label': 'Add a column',
      onchange: () => { const value = at.add.value; at.add.blur(); add(decode(value)); at.add.focus(); }, onblur: drawAddSoon,
    });
    at.latent = input('latent', 'latent', { inputmode: 'numeric', maxlength: 19 });
    at.sample = input('sample', 'sample', { inputmode: 'numeric', maxlength: 19 });
    at.temperature = input('temperature', 'temperature', { inputmode: 'decimal', maxlength: 8, placeholder: 'as trained' });
    at.pictures = segments('Pictures a column', ['1', '2', '3', '4'], (text) => { form.pictures = Number(text); });
    at.greedy = segments('How the policy writes', ['Sampled', 'Likeliest'], (text) => { form.greedy = text === 'Likeliest'; });
    at.models = h('select', { id: 'g-playground-models', class: 'g-select', onchange: () => { form.models = at.models.value; at.models.blur(); drawModels(); drawColumns(); note(); } });
    at.dice = dice('Another sampling seed', at.sample, 'sample');
    at.sampling = h('div', { class: 'g-playground-sampling' },
      field('sample', 'Sampling seed', 'Every rewrite that is sampled is drawn from this seed', at.sample, at.dice),
      field('temperature', 'Temperature', 'Above 1: more varied. Empty: as each run was trained', at.temperature));
    at.tries = h('div', { class: 'g-stack g-playground-tries' });
    at.empty = h('div', { class: 'g-card' }, grpo.empty('One prompt, several rewriters',
      'Every column shows what one policy makes of your prompt, drawn from the same noise and scored against the prompt as you wrote it, so that the rewrite is all that differs. Nothing here is recorded, and no run is changed.'));
    root.append(h('div', { class: 'g-stack' },
      h('form', { class: 'g-card g-playground-form', 'aria-label': 'A new try', onsubmit: (event) => event.preventDefault(), onkeydown: keys },
        h('div', { class: 'g-playground-top' }, h('div', { class: 'g-field' }, h('label', { for: 'g-playground-prompt' }, 'Prompt'), at.prompt), at.go),
        at.error, at.examples,
        h('div', { class: 'g-playground-line' }, h('span', { class: 'g-playground-name' }, 'Columns'), at.chips, at.add),
        h('div', { class: 'g-playground-settings' },
          h('div', { class: 'g-field' }, h('span', { class: 'g-label' }, 'Pictures'), at.pictures),
          field('latent', 'Latent seed', 'The noise of the first picture; the others follow from it. All columns share it', at.latent, dice('Another latent seed', at.latent, 'latent')),
          h('div', { class: 'g-field' }, h('span', { class: 'g-label' }, 'Rewrites'), at.greedy), at.sampling,
          field('models', 'Models', 'Whose image model draws, whose reward model scores, and what the untrained policy is', at.models))),
      at.tries, at.empty));
  }

  const drawAddSoon = () => setTimeout(drawAdd, 0);

  function keys(event) {
    if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    for (const key of ['latent', 'sample', 'temperature']) form[key] = at[key].value.trim();
    at.go.click();
  }

  return {
    mount(root) {
      build(root);
      showForm();
    },
    async show(args) {
      await askChoices(true);
      restore(args);
      note();
    },
    hide() { clearTimeout(waiting); waiting = null; },
    change() { return askChoices(false); },
  };
})());
