/* The table of runs: choose, sort, filter, rename, tag, note, delete.

   const table = grpo.compare.table(host, {onChoose(ids), onChange()});
   table.update(rows, order)   rows: Map id -> row; order: ids, newest first
   table.choose(ids)           which are ticked */
'use strict';

(() => {
  const { h } = grpo;
  grpo.compare = grpo.compare || {};

  const gainKey = (run) => (run.gain ? run.gain.mean : -Infinity);
  const COLUMNS = [
    { key: 'name', label: 'Run', by: (run) => run.name.toLowerCase() },
    { key: 'state', label: 'State', by: (run) => run.state },
    { key: 'preset', label: 'Preset', by: (run) => run.preset },
    { key: 'gain', label: 'Gain', by: gainKey, number: true, title: 'Paired gain of the reward on held-out prompts, with its interval' },
    { key: 'step', label: 'Steps', by: (run) => run.step, number: true },
    { key: 'seconds', label: 'Duration', by: (run) => run.seconds ?? -1, number: true, title: 'From its start to its end, or to its last sign of life' },
    { key: 'created', label: 'Created', by: (run) => run.created, number: true },
    { key: 'tags', label: 'Tags', by: (run) => run.tags.join(' ').toLowerCase() },
    { key: 'notes', label: 'Notes', by: (run) => run.notes.toLowerCase() },
  ];

  const swatch = (run) => h('span', { class: 'g-compare-swatch', style: { background: grpo.color(run.number) }, 'aria-hidden': 'true' });
  const recorded = () => h('span', { class: 'g-chip', title: 'Imported from a bundle: to look at, it can\u2019t go on' }, 'recorded');
  const matches = (run, words) => {
    const text = [run.name, run.id, run.preset, run.state, run.recorded ? 'recorded' : '', ...run.tags].join('\n').toLowerCase();
    return words.every((word) => text.includes(word));
  };

  function gain(run) {
    const { gain: found, confidence } = run;
    if (!found) return h('span', { class: 'g-faint', title: 'No final evaluation yet' }, '\u2013');
    const clear = found.low > 0 || found.high < 0;
    const interval = found.low === null ? '' : `${grpo.signed(found.low, 1)} to ${grpo.signed(found.high, 1)}`;
    const note = `${grpo.percent(confidence)} interval over ${found.n} prompts${clear ? '' : '; not distinguishable from zero'}`;
    return h('span', { title: note }, h('span', { class: clear ? 'g-strong' : 'g-quiet' }, grpo.signed(found.mean, 1)),
      h('span', { class: 'g-quiet g-small g-compare-interval' }, interval));
  }

  class Table {
    constructor(host, { onChoose, onChange }) {
      Object.assign(this, { onChoose, onChange, rows: new Map(), order: [], chosen: new Set(), lines: new Map() });
      this.sort = grpo.recall('compare.sort', { key: 'created', down: true });
      this.filter = h('input', { type: 'search', class: 'g-input', placeholder: 'Filter by name, tag, preset, state', 'aria-label': 'Filter runs', oninput: () => this.arrange() });
      this.count = h('span', { class: 'g-quiet g-small', role: 'status' });
      this.remove = grpo.button('Delete', () => this.deleteChosen(), { kind: 'danger small', glyph: 'trash' });
      this.all = h('input', { type: 'checkbox', 'aria-label': 'Choose all runs shown', onchange: () => this.toggleAll() });
      this.heads = COLUMNS.map((column) => h('th', { scope: 'col', class: [column.number && 'g-number', `g-compare-c-${column.key}`], title: column.title },
        h('button', { type: 'button', class: 'g-compare-sort', onclick: () => this.sortBy(column.key) }, column.label)));
      this.body = h('tbody');
      this.none = h('p', { class: 'g-quiet g-compare-none', hidden: true }, 'No run matches the filter.');
      host.append(h('section', { class: 'g-card', 'aria-label': 'Runs' },
        h('header', { class: 'g-compare-bar' }, h('h2', {}, 'Runs'), this.count, h('span', { class: 'g-push g-compare-filter' }, this.filter), this.remove,
          h('a', { class: 'g-button small', href: '/grpo/compare/runs.csv', download: 'runs.csv' }, 'CSV')),
        h('div', { class: 'g-scroll g-compare-table' }, h('table', { class: 'g-table' },
          h('thead', {}, h('tr', {}, h('th', { scope: 'col', class: 'g-compare-tick' }, this.all), this.heads)), this.body), this.none)));
    }

    update(rows, order) {
      this.rows = rows;
      this.order = order;
      for (const [id, line] of this.lines) {
        if (!rows.has(id)) {
          line.node.remove();
          this.lines.delete(id);
        }
      }
      for (const id of order) this.draw(rows.get(id));
      this.arrange();
    }

    choose(ids) {
      this.chosen = new Set(ids);
      for (const [id, line] of this.lines) this.tick(id, line);
      this.tools();
    }

    tick(id, line) {
      line.box.checked = this.chosen.has(id);
      line.node.setAttribute('aria-selected', String(this.chosen.has(id)));
    }

    /* A cell is made again only when what it shows has changed, so focus and an open edit stay. */
    draw(run) {
      let line = this.lines.get(run.id);
      if (!line) {
        line = { cells: {}, shown: {} };
        line.box = h('input', { type: 'checkbox', onchange: () => this.toggle(run.id) });
        for (const { key, number } of COLUMNS) line.cells[key] = h('td', { class: [number && 'g-number', `g-compare-c-${key}`] });
        line.node = h('tr', { data: { run: run.id } }, h('td', { class: 'g-compare-tick' }, line.box), Object.values(line.cells));
        line.node.addEventListener('click', (event) => { if (!event.target.closest('a, button, input')) this.toggle(run.id); });
        this.lines.set(run.id, line);
        this.tick(run.id, line);
      }
      line.box.setAttribute('aria-label', `Compare ${run.name}`);
      const cell = (key, shown, ...content) => {
        const now = JSON.stringify(shown);
        if (line.shown[key] === now || (key === 'name' && line.editing)) return;
        line.shown[key] = now;
        line.cells[key].replaceChildren();
        grpo.add(line.cells[key], content);
      };
      const { id, name } = run;
      cell('name', [name, run.recorded], h('span', { class: 'g-compare-name' }, swatch(run),
        h('a', { href: `#live?run=${encodeURIComponent(id)}`, title: `${name} (${id})` }, name), run.recorded ? recorded() : null,
        h('button', { type: 'button', class: 'g-icon g-compare-edit', 'aria-label': `Rename ${name}`, onclick: () => this.rename(id) }, grpo.icon('edit'))));
      cell('state', run.state, grpo.state(run.state));
      cell('preset', run.preset, run.preset);
      cell('gain', [run.gain, run.confidence], gain(run));
      cell('step', [run.step, run.total], `${run.step} / ${run.total}`);
      cell('seconds', run.seconds === null ? null : Math.round(run.seconds), grpo.duration(run.seconds));
      cell('created', run.created, h('span', { title: grpo.date(run.created) }, grpo.shortDate(run.created)));
      cell('tags', [name, run.tags], h('button', { type: 'button', class: 'g-compare-open', 'aria-label': `Tags of ${name}${run.tags.length ? `: ${run.tags.join(', ')}` : ''}`, title: run.tags.join(', ') || null, onclick: () => this.describe(id, 'tags') },
        run.tags.length ? [h('span', { class: 'g-chip' }, run.tags[0]), run.tags.length > 1 ? h('span', { class: 'g-quiet g-small' }, `and ${run.tags.length - 1} more`) : null] : h('span', { class: 'g-faint' }, 'add')));
      cell('notes', [name, run.notes], h('button', { type: 'button', class: 'g-compare-open g-compare-notes', 'aria-label': `Notes on ${name}`, title: run.notes.slice(0, 400), onclick: () => this.describe(id, 'notes') },
        run.notes ? run.notes.split('\n')[0] : h('span', { class: 'g-faint' }, 'add')));
    }

    sortBy(key) {
      this.sort = { key, down: this.sort.key === key ? !this.sort.down : ['gain', 'step', 'seconds', 'created'].includes(key) };
      grpo.remember('compare.sort', this.sort);
      this.arrange();
    }

    /* Put the rows in order. The one with the focus stays and the others go round it: moved, it would lose the focus,
       and a name that is being typed would be saved half. */
    place(nodes) {
      const still = nodes.find((node) => node.contains(document.activeElement));
      let at = this.body.firstChild;
      for (const node of nodes) {
        while (node === still && at !== still) {
          const next = at.nextSibling;
          this.body.append(at);
          at = next;
        }
        if (node === at) at = at.nextSibling;
        else this.body.insertBefore(node, at);
      }
    }

    /* Order and filter; a row whose name is being typed stays in sight. */
    arrange() {
      const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      const column = COLUMNS.find(({ key }) => key === this.sort.key) || COLUMNS[0];
      const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
      const runs = this.order.map((id) => this.rows.get(id));
      runs.sort((a, b) => (this.sort.down ? -1 : 1) * compare(column.by(a), column.by(b)) || b.number - a.number);
      this.shown = runs.filter((run) => matches(run, words)).map((run) => run.id);
      const visible = new Set(this.shown);
      const nodes = runs.map((run) => this.lines.get(run.id).node);
      this.place(nodes);
      for (const [id, line] of this.lines) line.node.hidden = !visible.has(id) && !line.editing;
      this.heads.forEach((head, index) => {
        const mine = COLUMNS[index] === column;
        if (mine) head.setAttribute('aria-sort', this.sort.down ? 'descending' : 'ascending');
        else head.removeAttribute('aria-sort');
      });
      this.none.hidden = !runs.length || this.shown.length > 0;
      this.tools();
    }

    tools() {
      const total = this.order.length, shown = (this.shown || []).length;
      grpo.text(this.count, `${shown === total ? total : `${shown} of ${total}`} run${total === 1 ? '' : 's'}, ${this.chosen.size} chosen`);
      const active = [...this.chosen].map((id) => this.rows.get(id)).filter((run) => run && run.active);
      this.remove.disabled = !this.chosen.size || active.length > 0;
      this.remove.title = active.length ? `${active[0].name} is ${active[0].state}: stop it before deleting it` : this.chosen.size ? 'Delete the chosen runs' : 'Choose the runs to delete';
      const ticked = (this.shown || []).filter((id) => this.chosen.has(id)).length;
      this.all.checked = shown > 0 && ticked === shown;
      this.all.indeterminate = ticked > 0 && ticked < shown;
    }

    toggle(id) {
      const ids = new Set(this.chosen);
      if (!ids.delete(id)) ids.add(id);
      this.onChoose([...ids]);
    }

    toggleAll() {
      const ids = new Set(this.chosen);
      for (const id of this.shown) {
        if (this.all.checked) ids.add(id);
        else ids.delete(id);
      }
      this.onChoose([...ids]);
    }

    rename(id) {
      const run = this.rows.get(id), line = this.lines.get(id);
      const input = h('input', { class: 'g-input g-compare-rename', value: run.name, maxlength: 120, 'aria-label': `New name of ${run.name}` });
      let open = true;
      const end = () => {
        open = line.editing = false;
        line.shown.name = '';
        if (this.rows.has(id)) this.draw(this.rows.get(id));
        this.arrange();
        const edit = line.node.querySelector('.g-compare-edit');
        if (edit) edit.focus();
      };
      const save = async () => {
        if (!open) return;
        if (input.value.trim() === run.name) return end();
        try {
          const told = await grpo.post('compare/rename', { run: id, name: input.value });
          this.rows.set(id, told.run);
          end();
        } catch (error) {
          input.setAttribute('aria-invalid', 'true');
          grpo.toast(error.message, 'error');
          if (error.status === 404) end();
          return undefined;
        }
        return this.onChange();
      };
      input.addEventListener('keydown', (event) => {
        if (event.key === 'Enter') save();
        else if (event.key === 'Escape') end();
      });
      input.addEventListener('blur', () => { if (open && input.getAttribute('aria-invalid') !== 'true') save(); });
      line.editing = true;
      line.cells.name.replaceChildren(h('span', { class: 'g-compare-name' }, swatch(run), input));
      input.focus();
      input.select();
    }

    /* Tags and notes, in a dialog that stays open when they are refused. */
    describe(id, focus) {
      const run = this.rows.get(id);
      const tags = h('input', { class: 'g-input', value: run.tags.join(', '), placeholder: 'baseline, long', 'aria-label': 'Tags' });
      const notes = h('textarea', { class: 'g-input', rows: 8, 'aria-label': 'Notes' }, run.notes);
      const error = h('p', { class: 'g-bad-text g-small', role: 'alert' });
      const form = h('form', { class: 'g-stack' },
        h('div', { class: 'g-field' }, h('label', {}, 'Tags, with commas between them'), tags), h('div', { class: 'g-field' }, h('label', {}, 'Notes'), notes), error,
        h('div', { class: 'g-row g-compare-end' }, h('button', { type: 'submit', class: 'g-button primary' }, 'Save')));
      const box = grpo.dialog(run.name, form);
      form.addEventListener('submit', async (event) => {
        event.preventDefault();
        try {
          const list = tags.value.split(',').map((tag) => tag.trim()).filter(Boolean);
          if (list.join('\n') !== run.tags.join('\n')) await grpo.post('compare/tags', { run: id, tags: list });
          if (notes.value !== run.notes) await grpo.post('compare/notes', { run: id, notes: notes.value });
          box.close();
          this.onChange();
        } catch (failure) {
          grpo.text(error, failure.message);
        }
      });
      (focus === 'tags' ? tags : notes).focus();
    }

    async deleteChosen() {
      const runs = [...this.chosen].map((id) => this.rows.get(id)).filter(Boolean);
      const names = runs.length <= 4 ? runs.map((run) => run.name).join(', ') : `${runs.slice(0, 3).map((run) => run.name).join(', ')} and ${runs.length - 3} more`;
      const verb = runs.length === 1 ? 'Delete the run' : `Delete ${runs.length} runs`;
      if (!await grpo.confirm(`${names}: metrics, rewrites, pictures and checkpoints go, and can\u2019t be brought back.`, verb, 'danger')) return;
      await grpo.post('compare/delete', { runs: runs.map((run) => run.id) });
      await this.onChange();
    }
  }

  grpo.compare.table = (host, options) => new Table(host, options);
  grpo.compare.swatch = swatch;
  grpo.compare.recorded = recorded;
})();
