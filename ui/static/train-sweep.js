/* Sweeps, and asking for names: what the train screen does with several runs, and with what is saved.

   const sweep = grpo.trainSweep(desk)    a card: settings, values, the grid they make; desk as train.js makes it
   sweep.node, sweep.update()             update: the other settings have changed
   await grpo.trainName(title, {...})     ask for a name until saving under it works; null when given up
   grpo.trainToken()                      a token for a request that must be carried out once */
'use strict';

(() => {
  const { h } = grpo;
  const SWEPT = ['integer', 'number', 'choice', 'switch', 'text'];

  grpo.trainSweep = (desk) => {
    const choices = desk.fields.filter((field) => SWEPT.includes(field.kind) && !['preset', 'recording.name', 'data.prompts'].includes(field.name));
    const sections = [...new Set(choices.map((field) => (field.group ? 'Most used' : field.section)))];
    let asked = 0, waiting = null, looked = '', token = grpo.trainToken();
    const renew = () => { token = grpo.trainToken(); };

    function axis(number) {
      const pick = h('select', { class: 'g-select', 'aria-label': `Setting ${number} of the sweep`, onchange: () => { hint(); changed(); } },
        h('option', { value: '' }, number === 1 ? 'Choose a setting' : 'No second setting'),
        sections.map((title) => h('optgroup', { label: title }, choices.filter((field) => (field.group ? 'Most used' : field.section) === title)
          .map((field) => h('option', { value: field.name }, field.label)))));
      const values = h('input', { class: 'g-input', 'aria-label': `Values of setting ${number}, with commas between them`, autocomplete: 'off', spellcheck: 'false', disabled: true, oninput: () => changed() });
      const hint = () => {
        const field = desk.field(pick.value);
        values.disabled = !field;
        values.placeholder = !field ? '' : field.kind === 'choice' ? field.options.map(([key]) => key).join(', ')
          : field.kind === 'switch' ? 'on, off' : `${desk.value(field.name) || 'a'}, ...`;
      };
      return { pick, values, read: () => (pick.value ? { field: pick.value, values: values.value.split(',').map((item) => item.trim()).filter(Boolean) } : null) };
    }

    const pair = [axis(1), axis(2)];
    const said = h('p', { class: 'g-quiet g-small', role: 'status' }, 'Every combination becomes a run of its own, with everything else as above.');
    const names = h('ol', { class: 'g-train-names', hidden: true });
    const button = h('button', { type: 'button', class: 'g-button primary', disabled: true, onclick: (event) => { if (event.detail < 2) grpo.attempt(button, queue); } }, 'Queue the grid');
    const node = h('details', { class: 'g-card g-train-rest' },
      h('summary', {}, h('h2', {}, 'Sweep'), h('span', { class: 'g-quiet g-small' }, 'several values of one or two settings')),
      h('div', { class: 'g-stack' },
        h('div', { class: 'g-train-axes' }, pair.map((item) => [item.pick, item.values])), said, names, h('div', { class: 'g-row' }, button)));

    const axes = () => pair.map((item) => item.read()).filter((item) => item && item.values.length);

    function changed() {
      renew();
      button.disabled = true;
      clearTimeout(waiting);
      waiting = setTimeout(look, 350);
    }

    const key = () => JSON.stringify([desk.asked(), axes()]);

    async function look() {
      const wanted = axes();
      looked = key();
      asked += 1;
      const mine = asked;
      if (!wanted.length) {
        show([], '', false);
        return;
      }
      try {
        const grid = await grpo.post('train/sweep', { ...desk.asked(), axes: wanted });
        if (mine !== asked) return;
        const many = grid.names.length;
        const time = grid.total === null ? '' : `, about ${grpo.duration(grid.total)} in all`;
        const wrong = grid.problems.length ? `${grid.problems[0]}${grid.problems.length > 1 ? ` (and ${grid.problems.length - 1} more)` : ''}` : '';
        show(grid.names, wrong || `${many} ${many === 1 ? 'run' : 'runs'}${time}, one after the other.`, Boolean(wrong), many);
      } catch (error) {
        if (mine === asked) show([], error.message, true);
      }
    }

    function show(list, sentence, wrong, many = 0) {
      grpo.text(said, sentence || 'Every combination becomes a run of its own, with everything else as above.');
      said.classList.toggle('g-bad-text', wrong);
      names.hidden = list.length === 0;
      grpo.fill(names, list.map((name) => h('li', {}, name)));
      button.disabled = wrong || !many;
      button.textContent = many ? `Queue ${many} ${many === 1 ? 'run' : 'runs'}` : 'Queue the grid';
    }

    async function queue() {
      const done = await grpo.post('train/sweep', { ...desk.asked(), axes: axes(), token });
      renew();
      grpo.toast(done.message);
    }

    return { node, update: () => { if (axes().length && key() !== looked) changed(); } };
  };

  grpo.trainToken = () => (crypto.randomUUID ? crypto.randomUUID() : Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, '0')).join(''));

  /* Ask for a name and save under it; asks again before anything is replaced. save(name, overwrite) throws grpo.Failure. */
  grpo.trainName = (title, { about, name, verb, save }) => new Promise((resolve) => {
    const input = h('input', { class: 'g-input', id: 'g-train-name', value: name, maxlength: '60', autocomplete: 'off', spellcheck: 'false', 'aria-describedby': 'g-train-name-error' });
    const error = h('p', { class: 'g-error', id: 'g-train-name-error', role: 'alert' });
    const button = grpo.button(verb, () => go(false), { kind: 'primary' });
    const shown = grpo.dialog(title, h('form', { class: 'g-stack', onsubmit: (event) => { event.preventDefault(); button.click(); } },
      h('p', { class: 'g-quiet' }, about), h('div', { class: 'g-field' }, h('label', { for: 'g-train-name' }, 'Name'), input, error), h('div', { class: 'g-row' }, button)));
    input.select();

    async function go(overwrite) {
      try {
        const answer = await save(input.value.trim(), overwrite);
        shown.close();
        resolve(answer);
      } catch (failure) {
        if (failure.field === 'overwrite' && await grpo.confirm(`${failure.message} What it holds now is lost.`, 'Replace it', 'danger')) {
          await go(true);
          return;
        }
        if (failure.field !== 'overwrite') grpo.text(error, failure.message);
        input.setAttribute('aria-invalid', 'true');
        input.focus();
      }
    }
    shown.closed.then(() => resolve(null));
  });
})();
