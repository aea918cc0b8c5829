/* The prompt set: choosing one, what is in it, a table to edit it, and uploads.

   const prompts = grpo.trainPrompts(desk)    desk as train.js makes it
   prompts.node, prompts.show(fault)          show what the settings name; asks the server only when that has changed
   prompts.list(sets)                         the sets there are */
'use strict';

(() => {
  const { h, icon } = grpo;
  const ROWS = 50;  // rows of a page of the table
  const TITLES = { train: 'Train', validation: 'Validation', test: 'Test', basic: 'basic', challenging: 'challenging', complex: 'complex' };

  grpo.trainPrompts = (desk) => {
    let sets = [], shown = null, about = null;
    const drafts = {};  // set -> edited rows that are not saved
    const pick = h('select', { class: 'g-select', id: 'g-train-prompts', onchange: () => { refusal = ''; desk.set('data.prompts', pick.value); } });
    const table = h('div', { class: 'g-train-counts' });
    const report = h('details', { class: 'g-small', hidden: true });
    const error = h('p', { class: 'g-error g-train-problems', hidden: true });
    let refusal = '';  // of an upload; it stays until another set is chosen
    let fault = '', unread = '';  // what is wrong with the setting; why the set could not be read
    const file = h('input', { type: 'file', accept: '.jsonl,.txt,.csv', hidden: true, 'aria-label': 'Prompt file', onchange: () => upload() });
    const edit = grpo.button('View and edit', () => editor(), { kind: 'small' });
    const send = grpo.button('Upload', () => file.click(), { kind: 'small', glyph: 'upload', title: 'A JSONL, TXT or CSV file with one prompt a row' });
    const node = h('section', { class: 'g-stack g-tight', 'aria-label': 'Prompt set' },
      h('div', { class: 'g-field' }, h('label', { for: 'g-train-prompts' }, 'Prompt set', h('button', { type: 'button', class: 'g-chip changed g-train-reset', hidden: true, onclick: () => desk.set('data.prompts', null) }, 'changed', icon('close'))), pick),
      error, table, report, h('div', { class: 'g-row' }, edit, send, file));
    const chip = node.querySelector('.g-train-reset');

    function list(fresh) {
      sets = fresh;
      const value = desk.value('data.prompts');
      const options = (shipped) => sets.filter((set) => set.shipped === shipped).map((set) => h('option', { value: set.value }, set.name));
      const known = sets.some((set) => set.value === value);
      const own = sets.some((set) => !set.shipped);
      grpo.fill(pick, known ? null : h('option', { value }, `${value} (as the preset says)`),
        h('optgroup', { label: 'Come with the program' }, options(true)), own ? h('optgroup', { label: 'Uploaded and edited' }, options(false)) : null);
      pick.value = value;
    }

    function tell() {
      const sentence = [fault, refusal, unread].filter(Boolean).join('\n');
      grpo.text(error, sentence);
      error.hidden = !sentence;
    }

    function show(sentence) {
      fault = sentence;
      const value = desk.value('data.prompts');
      pick.value = value;
      if (pick.selectedIndex < 0) list(sets);
      chip.hidden = !desk.changed('data.prompts');
      chip.title = `Back to ${desk.base()['data.prompts']}, as in the preset`;
      tell();
      return value === shown ? undefined : read(value);
    }

    /* Ask what is in a set. A question that is lost is asked again by the next look, or by a click on the button. */
    async function read(value) {
      edit.disabled = true;
      [shown, about] = [value, null];
      const known = sets.some((set) => set.value === value);
      let found = null, failure = null;
      try {
        found = known ? await grpo.get('train/prompts', { value }) : null;
      } catch (error) {
        failure = error;
      }
      if (value !== shown) return;  // another set was chosen meanwhile
      about = found;
      unread = failure ? failure.message : '';
      const lost = Boolean(failure) && failure.status === 0;
      if (lost) shown = null;
      edit.disabled = !about && !lost;
      tell();
      counts();
    }

    function counts() {
      report.hidden = !about || !about.report.length;
      if (!about) {
        grpo.fill(table, unread ? null : h('p', { class: 'g-quiet g-small' }, 'What is in this file is read when the run starts.'));
        return;
      }
      const sum = (split) => about.tiers.reduce((total, tier) => total + about.counts[split][tier], 0);
      grpo.fill(table, h('table', { class: 'g-table', 'aria-label': `Prompts of ${about.name} by split and tier` },
        h('thead', {}, h('tr', {}, h('th', {}, ''), about.tiers.map((tier) => h('th', { class: 'g-number', scope: 'col' }, TITLES[tier])), h('th', { class: 'g-number', scope: 'col' }, 'all'))),
        h('tbody', {}, about.splits.map((split) => h('tr', {}, h('th', { scope: 'row' }, TITLES[split]),
          about.tiers.map((tier) => h('td', { class: 'g-number' }, String(about.counts[split][tier]))), h('td', { class: 'g-number g-strong' }, String(sum(split))))))));
      grpo.fill(report, h('summary', {}, `${about.report.length} ${about.report.length === 1 ? 'note' : 'notes'} on this set`), h('ul', {}, about.report.map((line) => h('li', {}, line))));
    }

    function chosen(answer) {
      shown = null;
      list(answer.sets);
      desk.sets(answer.sets);
      desk.set('data.prompts', answer.value);
    }

    function upload() {
      const [one] = file.files;
      if (!one) return;
      file.value = '';  // so that the same file, mended, can be chosen again
      refusal = '';
      grpo.attempt(send, async () => {
        try {
          if (one.size > desk.mostBytes) throw new grpo.Failure(`${one.name} has ${grpo.bytes(one.size)}; a prompt set has at most ${grpo.bytes(desk.mostBytes)}. Divide the file.`);
          const answer = await grpo.send(`train/prompts/upload?max_chars=${chars()}`, one);
          chosen(answer);
          grpo.toast(`${one.name} is a prompt set now.`);
        } catch (failure) {  // a list of lines to mend: it stays until something else is chosen
          refusal = failure.message;
          tell();
        }
      });
    }

    /* How many characters a prompt may have, as the settings say now. */
    const chars = () => Math.min(20000, Math.max(8, Math.round(Number(desk.value('data.max_prompt_chars'))) || 400));

    // -- the table ------------------------------------------------------------------------------------

    async function editor() {
      const base = desk.value('data.prompts');
      if (!about) await read(base);
      if (!about) return;  // the reason stands above the button
      const { name, splits, tiers } = about;
      const original = (await grpo.get('train/prompts/rows', { value: base })).rows;
      let rows = drafts[base] || original.map((row) => ({ ...row }));
      let page = 0, bad = new Set();
      const draft = () => { drafts[base] = rows; told(); };
      const search = h('input', { type: 'search', class: 'g-input', placeholder: 'Search the texts', 'aria-label': 'Search the texts', oninput: () => { page = 0; draw(); } });
      const filter = (label, values) => h('select', { class: 'g-select', 'aria-label': label, onchange: () => { page = 0; draw(); } },
        h('option', { value: '' }, `every ${label}`), values.map((value) => h('option', { value }, value)));
      const tier = filter('tier', tiers), split = filter('split', splits);
      const body = h('tbody', {});
      const found = h('span', { class: 'g-quiet g-small', role: 'status' });
      const pages = h('span', { class: 'g-row' });
      const problems = h('p', { class: 'g-error g-train-problems', role: 'alert', hidden: true });
      const state = h('span', { class: 'g-quiet g-small' });
      const save = grpo.button('Save as a new set', () => keep(), { kind: 'primary' });
      const discard = grpo.button('Discard changes', () => {
        delete drafts[base];
        rows = original.map((row) => ({ ...row }));
        bad = new Set();
        problems.hidden = true;
        draw();
      });

      const visible = () => {
        const text = search.value.trim().toLowerCase();
        return rows.filter((row) => (!text || row.text.toLowerCase().includes(text)) && (!tier.value || row.tier === tier.value) && (!split.value || row.split === split.value));
      };

      function told() {
        const edited = Boolean(drafts[base]);
        grpo.text(state, edited ? 'Changed, not saved. Kept while this page is open.' : 'As it is saved.');
        discard.hidden = !edited;
        save.disabled = !edited;
      }

      const choose = (row, key, values, number) => h('select', { class: 'g-select', 'aria-label': `${key} of prompt ${number}`, onchange: (event) => { row[key] = event.target.value; draft(); } },
        values.map((value) => h('option', { value, selected: value === row[key] }, value)));

      function draw() {
        const list = visible();
        const last = Math.max(0, Math.ceil(list.length / ROWS) - 1);
        page = Math.min(page, last);
        const place = new Map(rows.map((row, index) => [row, index + 1]));
        body.replaceChildren(...list.slice(page * ROWS, (page + 1) * ROWS).map((row) => {
          const number = place.get(row);
          const remove = h('button', { type: 'button', class: 'g-icon', 'aria-label': `Remove prompt ${number}`, title: 'Remove', onclick: () => { rows = rows.filter((item) => item !== row); draft(); draw(); } }, icon('trash'));
          return h('tr', { 'aria-invalid': bad.has(number) ? 'true' : null }, h('td', { class: 'g-number g-quiet' }, String(number)),
            h('td', {}, h('input', { class: 'g-input', 'aria-label': `Text of prompt ${number}`, 'aria-invalid': bad.has(number) ? 'true' : null, value: row.text, oninput: (event) => { row.text = event.target.value; draft(); } })),
            h('td', {}, choose(row, 'tier', tiers, number)), h('td', {}, choose(row, 'split', splits, number)), h('td', {}, remove));
        }));
        grpo.text(found, list.length === rows.length ? `${rows.length.toLocaleString()} prompts` : `${list.length.toLocaleString()} of ${rows.length.toLocaleString()} prompts`);
        const turn = (label, to, glyph) => h('button', { type: 'button', class: 'g-icon', 'aria-label': label, disabled: to < 0 || to > last, onclick: () => { page = to; draw(); } }, icon(glyph));
        pages.replaceChildren(turn('Page before', page - 1, 'left'), h('span', { class: 'g-small g-quiet' }, `${page + 1} / ${last + 1}`), turn('Next page', page + 1, 'right'));
        told();
      }

      function add() {
        search.value = '';
        [tier.value, split.value] = ['', ''];
        rows = [...rows, { id: '', text: '', tier: tiers[0], split: 'train' }];
        page = Math.ceil(rows.length / ROWS);
        draft();
        draw();
        body.lastElementChild.querySelector('input').focus();
      }

      async function keep() {
        if (rows.length > desk.mostPrompts) throw new grpo.Failure(`The table has ${rows.length.toLocaleString()} prompts; a set has at most ${desk.mostPrompts.toLocaleString()}.`);
        const shipped = sets.some((set) => set.value === base && set.shipped);
        const answer = await grpo.trainName('Save the prompt set', {
          about: 'Sets that come with the program stay as they are. A prompt whose text you changed is a new prompt: what else was known of the old one (such as what the checker looks for) goes.',
          name: shipped ? `${name}-edited` : name, verb: 'Save',
          save: async (wanted, overwrite) => {
            try {
              return await grpo.post('train/prompts/save', { name: wanted, base, rows, max_chars: chars(), overwrite });
            } catch (failure) {
              if (failure.field !== 'rows') throw failure;
              return { refused: failure.message };
            }
          },
        });
        if (!answer) return;
        problems.hidden = !answer.refused;
        bad = new Set();
        if (answer.refused) {
          for (const [, number] of answer.refused.matchAll(/, line (\d+):/g)) bad.add(Number(number));
          grpo.text(problems, answer.refused.replace(/^[^\n]*?, line (\d+):/gm, 'Row $1:'));
          const first = Math.min(...bad);
          if (Number.isFinite(first)) {
            search.value = '';
            [tier.value, split.value] = ['', ''];
            page = Math.floor((first - 1) / ROWS);
          }
          draw();
          return;
        }
        delete drafts[base];
        open.close();
        chosen(answer);
        grpo.toast('The prompt set is saved and chosen.');
      }

      const open = grpo.dialog(`Prompts: ${name}`, h('div', { class: 'g-stack g-train-editor' },
        h('div', { class: 'g-row' }, search, tier, split, found, h('span', { class: 'g-row g-push' }, pages, grpo.button('Add a prompt', add, { glyph: 'plus', kind: 'small' }))),
        problems,
        h('div', { class: 'g-train-rows' }, h('table', { class: 'g-table' }, h('thead', {}, h('tr', {}, ['', 'Text', 'Tier', 'Split', ''].map((title) => h('th', { scope: 'col' }, title)))), body)),
        h('div', { class: 'g-row' }, state, h('span', { class: 'g-row g-push' }, discard, save))));
      open.node.classList.add('g-large');
      draw();
    }

    return { node, list, show, focus: () => pick.focus() };
  };
})();
