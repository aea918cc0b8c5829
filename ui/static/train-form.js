/* The settings as a form: groups of those that people change, and all the rest with a search.

   const form = grpo.trainForm(fields, methods, change)   `fields` and `methods` as /grpo/train/form has them;
                                change({name: value}) on input, null = as in the preset
   form.groups, form.rest       the two parts, to be put on the page
   form.show(base, values)      the preset's values, and what is changed of them; never touches a field being typed in
   form.problems(sentences)     {name: sentence} at their fields
   form.focus(name)             open what hides a field, and focus it
   grpo.trainForm.same(field, a, b), .text(field, value)    compare values, and say one in a line */
'use strict';

(() => {
  const { h, icon } = grpo;

  const METHOD_GROUP = 'Objective';

  const plain = (value) => (Array.isArray(value) ? value.join(', ') : String(value));

  /* Whether two values mean the same: 1e-3 and 0.001 do. */
  function same(field, a, b) {
    if (Array.isArray(a) || Array.isArray(b)) return JSON.stringify(a) === JSON.stringify(b);
    if (typeof a !== 'string' || typeof b !== 'string') return a === b;
    if (field.kind !== 'number' && field.kind !== 'integer') return a === b;
    const [x, y] = [a.trim(), b.trim()];
    return x === y || (x !== '' && y !== '' && Number(x) === Number(y));
  }

  /* A value in one line. */
  function text(field, value) {
    if (typeof value === 'boolean') return value ? 'on' : 'off';
    if (field.kind === 'choice') return (field.options.find(([key]) => key === value) || [value, value])[1];
    const line = plain(value).replace(/\s+/g, ' ').trim();
    if (field.name === 'data.prompts') return line.split(/[\\/]/).pop().replace(/\.jsonl$/, '');
    return line === '' ? 'empty' : line.length > 40 ? `${line.slice(0, 38)}\u2026` : line;
  }

  /* The element a setting is typed into: {node, input (what is focused and marked), get(), set(value)}. */
  function control(field, id, change) {
    const about = { id, 'aria-describedby': `${id}-help ${id}-error` };
    if (field.kind === 'switch') {
      const input = h('input', { type: 'checkbox', ...about, onchange: () => { said(); change(input.checked); } });
      const word = h('span', {}, 'off');
      const said = () => grpo.text(word, input.checked ? 'on' : 'off');
      return { node: h('label', { class: 'g-check g-train-switch' }, input, word), input, get: () => input.checked, set: (value) => { input.checked = value; said(); } };
    }
    if (field.kind === 'choice') {
      const input = h('select', { class: 'g-select', ...about, onchange: () => change(input.value) },
        field.options.map(([value, label]) => h('option', { value }, label)));
      return { node: input, input, get: () => input.value, set: (value) => { input.value = value; } };
    }
    if (field.kind === 'choices') {
      const boxes = field.options.map(([value, label]) => {
        const box = h('input', { type: 'checkbox', value, onchange: () => change(get()) });
        return { box, node: h('label', { class: 'g-check' }, box, label) };
      });
      const get = () => boxes.filter(({ box }) => box.checked).map(({ box }) => box.value);
      const node = h('div', { class: 'g-row', role: 'group', 'aria-label': field.label, id, tabindex: '-1' }, boxes.map((item) => item.node));
      return { node, input: node, get, set: (value) => boxes.forEach(({ box }) => { box.checked = value.includes(box.value); }) };
    }
    const many = field.kind === 'list';
    const numeric = field.kind === 'number' || field.kind === 'integer';
    const input = h(field.kind === 'long' ? 'textarea' : 'input', {
      class: ['g-input', field.kind === 'long' && 'g-train-long'], type: field.kind === 'long' ? null : 'text', rows: field.kind === 'long' ? '1' : null,
      autocomplete: 'off', spellcheck: 'false', inputmode: numeric ? 'decimal' : null,
      placeholder: field.optional ? 'none' : many ? 'words, with commas between' : null, ...about, oninput: () => change(get()),
    });
    const get = () => (many ? input.value.split(',').map((item) => item.trim()).filter(Boolean) : input.value);
    return { node: input, input, get, set: (value) => { input.value = plain(value); } };
  }

  function trainForm(fields, methods, change) {
    const parts = {};

    function build(field) {
      const id = `g-train-${field.name.replace(/\W/g, '-')}`;
      const part = { field, ...control(field, id, (value) => change({ [field.name]: value })) };
      part.reset = h('button', { type: 'button', class: 'g-chip changed g-train-reset', hidden: true, onclick: () => { change({ [field.name]: null }); part.input.focus(); } }, 'changed', icon('close'));
      part.limits = h('span', { class: 'g-train-limits' }, field.limits);
      part.error = h('p', { class: 'g-error', id: `${id}-error`, hidden: true });
      part.help = h('p', { class: 'g-help', id: `${id}-help` }, field.help);
      part.label = h('label', { for: id }, field.label);
      parts[field.name] = part;
      return part;
    }

    function short(field) {
      const part = build(field);
      part.row = h('div', { class: 'g-field g-train-field', data: { field: field.name } },
        h('div', { class: 'g-train-label' }, part.label, part.limits, part.reset), part.node, part.error, part.help);
      return part.row;
    }

    function long(field) {
      const part = build(field);
      part.row = h('div', { class: 'g-field g-train-line', data: { field: field.name } },
        h('div', { class: 'g-train-what' }, part.label, h('span', { class: 'g-mono g-faint' }, field.name)),
        h('div', { class: 'g-train-value' }, part.node, part.error),
        h('div', { class: 'g-train-about' }, part.help, h('div', { class: 'g-train-label' }, part.limits, part.reset)));
      return part.row;
    }

    /* The published variant that the parts make up; none of them, and it says so. It is no setting: choosing sets the parts. */
    const mixed = h('option', { value: '', hidden: true, disabled: true }, 'own mix');
    const method = h('select', { class: 'g-select', id: 'g-train-method', 'aria-describedby': 'g-train-method-help',
      onchange: () => change(methods.find((one) => one.name === method.value).parts) },
    mixed, methods.map(({ name, label }) => h('option', { value: name }, label)));
    const methodRow = h('div', { class: 'g-field g-train-field', data: { field: 'method' } },
      h('div', { class: 'g-train-label' }, h('label', { for: 'g-train-method' }, 'Method')), method,
      h('p', { class: 'g-help', id: 'g-train-method-help' }, 'A published variant: it sets the loss, the scaling, the baseline, the aggregation and the clips.'));

    const madeUp = (value) => methods.find((one) => Object.entries(one.parts).every(([name, part]) => same(parts[name].field, value(name), part)));

    const own = ['preset', 'recording.name', 'data.prompts'];
    const main = fields.filter((field) => field.group);
    const rest = fields.filter((field) => !field.group && !own.includes(field.name));
    const titles = [...new Set(main.map((field) => field.group))];
    const groups = h('div', { class: 'g-train-groups' }, titles.map((title) => h('section', { class: 'g-card', 'aria-label': title },
      h('header', {}, h('h2', {}, title)), h('div', { class: 'g-train-fields' }, title === METHOD_GROUP ? methodRow : null, main.filter((field) => field.group === title).map(short)))));

    const sections = [...new Set(rest.map((field) => field.section))].map((title) => ({
      title, fields: rest.filter((field) => field.section === title),
    }));
    for (const section of sections) {
      section.node = h('section', { class: 'g-train-section', 'aria-label': section.title }, h('h3', {}, section.title), section.fields.map(long));
    }
    const search = h('input', { type: 'search', class: 'g-input', placeholder: `Search ${fields.length} settings`, 'aria-label': 'Search all settings', autocomplete: 'off', oninput: () => filter() });
    const above = h('p', { class: 'g-row g-small g-quiet', hidden: true });
    const none = h('p', { class: 'g-quiet', hidden: true }, 'No setting has these words in its name or help.');
    const count = h('span', { class: 'g-quiet g-small' });
    const details = h('details', { class: 'g-card g-train-rest' },
      h('summary', {}, h('h2', {}, 'All settings'), h('span', { class: 'g-quiet g-small' }, `${rest.length} more`), count),
      h('div', { class: 'g-stack' }, search, above, none, sections.map((section) => section.node)));

    function filter() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const hit = (field) => words.every((word) => `${field.label} ${field.name} ${field.help}`.toLowerCase().includes(word));
      let found = 0;
      for (const section of sections) {
        const shown = section.fields.filter((field) => {
          parts[field.name].row.hidden = !hit(field);
          return hit(field);
        });
        section.node.hidden = shown.length === 0;
        found += shown.length;
      }
      const others = words.length ? main.filter(hit) : [];
      above.hidden = others.length === 0;
      above.replaceChildren('Above: ', ...others.map((field) => h('button', { type: 'button', class: 'g-button plain small', onclick: () => focus(field.name) }, field.label)));
      none.hidden = found > 0 || others.length > 0;
    }

    function show(base, values) {
      let changed = 0;
      for (const [name, part] of Object.entries(parts)) {
        const is = name in values;
        const value = is ? values[name] : base[name];
        if (!same(part.field, part.get(), value)) part.set(value);
        part.reset.hidden = !is;
        part.limits.hidden = is && Boolean(part.field.group);
        part.reset.setAttribute('aria-label', `${part.field.label} is changed; back to ${text(part.field, base[name])}, as in the preset`);
        part.reset.title = `Back to ${text(part.field, base[name])}, as in the preset`;
        if (is && !part.field.group) changed += 1;
      }
      const found = madeUp((name) => (name in values ? values[name] : base[name]));
      method.value = found ? found.name : '';
      grpo.text(count, changed ? `${changed} changed` : '');
    }

    function problems(sentences) {
      for (const [name, part] of Object.entries(parts)) {
        const sentence = sentences[name] || '';
        grpo.text(part.error, sentence);
        part.error.hidden = !sentence;
        part.help.hidden = Boolean(sentence && part.field.group);  // in its place, so that nothing moves
        if (sentence) part.input.setAttribute('aria-invalid', 'true');
        else part.input.removeAttribute('aria-invalid');
      }
    }

    function focus(name) {
      const part = parts[name];
      if (!part) return false;
      if (!part.field.group) {
        details.open = true;
        if (part.row.hidden || part.row.closest('section').hidden) {
          search.value = '';
          filter();
        }
      }
      part.input.scrollIntoView({ block: 'center' });
      part.input.focus({ preventScroll: true });
      return true;
    }

    return { groups, rest: details, show, problems, focus, order: Object.keys(parts) };
  }

  trainForm.same = same;
  trainForm.text = text;
  grpo.trainForm = trainForm;
})();
