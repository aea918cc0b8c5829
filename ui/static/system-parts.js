/* Pieces of the screen of runs and system: the export dialog, a job's line, the import card, the machine. */
'use strict';

(() => {
  const { h } = grpo;
  grpo.system = grpo.system || {};
  const MIB = 2 ** 20;
  const bundlePictures = [['all', 'All pictures'], ['tenth', 'Of every 10th step, and of the evaluations'], ['evaluations', 'Of the evaluations only'], ['none', 'No pictures']];
  const select = (label, options) => h('select', { class: 'g-select', 'aria-label': label }, options.map(([value, text]) => h('option', { value }, text)));
  const field = (label, control) => h('label', { class: 'g-field' }, h('span', { class: 'g-label' }, label), control);

  /* What to take out of a run; `begin(body)` is called once, with what was chosen. */
  grpo.system.exportDialog = async (run, limit, begin) => {
    const told = await grpo.get('system/export', { run: run.id });
    const first = told.formats.find(({ why }) => !why);
    const radios = told.formats.map(({ format, title, text, why }) => {
      const radio = h('input', { type: 'radio', name: 'g-system-format', value: format, disabled: Boolean(why), checked: format === (first && first.format), onchange: () => arrange() });
      return h('label', { class: ['g-system-format', why && 'g-system-off'] }, radio, h('span', {}, h('span', { class: 'g-strong' }, title), h('span', { class: 'g-quiet g-small g-system-line' }, text), why ? h('span', { class: 'g-small g-system-line' }, why) : null));
    });
    const pictures = select('Pictures', bundlePictures);
    const webp = h('input', { type: 'checkbox', checked: true });
    const step = told.checkpoints.length ? ` (step ${told.checkpoints[0]})` : '';
    const policy = select('Policy', [['last', `The last checkpoint${step}`], ['best', 'The best checkpoint']]);
    const without = h('option', { value: 'none' }, 'Without the policy');
    policy.append(without);
    const bundleOnly = h('div', { class: 'g-stack g-tight' }, field('Pictures', pictures),
      h('label', { class: 'g-check' }, webp, 'Make the pictures WebP: about ten times smaller, a little lossy'),
      h('p', { class: 'g-faint g-small' }, `A bundle of more than ${Math.round(limit / MIB)} MiB is imported with the command line, not through the browser.`));
    const format = () => (radios.map((label) => label.querySelector('input')).find((radio) => radio.checked) || {}).value;
    const go = h('button', { type: 'button', class: 'g-button primary', disabled: !first }, 'Export');
    function arrange() {
      const bundle = format() === 'bundle';
      bundleOnly.hidden = !bundle;
      without.hidden = without.disabled = !bundle;
      if (!bundle && policy.value === 'none') policy.value = 'last';
    }
    arrange();
    const box = grpo.dialog(`Export ${run.name}`, h('div', { class: 'g-stack' }, h('div', { class: 'g-stack g-tight', role: 'radiogroup', 'aria-label': 'Format' }, radios), told.checkpoints.length ? field('Policy', policy) : null, bundleOnly, h('div', { class: 'g-row g-system-end' }, go)));
    go.addEventListener('click', () => grpo.attempt(go, async () => {
      const chosen = pictures.value;
      await begin({ run: run.id, format: format(), checkpoint: policy.value, images: chosen === 'tenth' ? 'all' : chosen, every: chosen === 'tenth' ? 10 : 1, reencode: webp.checked });
      box.close();
    }));
  };

  const BUSY = { waiting: 'waits its turn', working: 'working' };

  /* A job as a line: what it is, how far, what came of it. The same nodes for the same job, so a bar moves and does not jump. */
  class JobLine {
    constructor(job, { onDiscard }) {
      this.title = h('span', { class: 'g-strong' }, job.title);
      this.text = h('span', { class: 'g-quiet g-small', role: 'status' });
      this.fillBar = h('span');
      this.bar = h('div', { class: 'g-bar', role: 'progressbar', 'aria-label': job.title, 'aria-valuemin': 0, 'aria-valuemax': 100 }, this.fillBar);
      this.tools = h('span', { class: 'g-row g-push' });
      this.onDiscard = onDiscard;
      this.node = h('li', { class: 'g-system-job', data: { job: job.kind } }, h('div', { class: 'g-row' }, h('div', { class: 'g-system-told' }, this.title, this.text), this.tools), this.bar);
      this.update(job);
    }

    update(job) {
      const busy = job.state === 'waiting' || job.state === 'working';
      const share = job.total ? job.done / job.total : 0;
      this.bar.hidden = !busy;
      this.bar.classList.toggle('g-system-unknown', job.state === 'working' && !job.total);
      this.fillBar.style.width = `${100 * share}%`;
      if (job.total) this.bar.setAttribute('aria-valuenow', Math.round(100 * share));
      else this.bar.removeAttribute('aria-valuenow');
      const amount = (n) => (job.unit === 'bytes' ? grpo.bytes(n) : String(n));
      const far = job.total ? `, ${amount(job.done)} of ${amount(job.total)}${job.unit === 'bytes' ? '' : ` ${job.unit}`}` : '';
      grpo.text(this.text, busy ? `${job.message || BUSY[job.state]}${far}` : job.message);
      this.text.classList.toggle('g-bad-text', job.state === 'failed');
      if (this.state === job.state) return;
      this.state = job.state;
      this.tools.replaceChildren();
      if (job.state === 'failed') this.tools.append(grpo.state('failed'));
      if (job.file) {
        this.tools.append(h('a', { class: 'g-button primary small', href: `/grpo/system/download/${job.token}`, download: job.file }, grpo.icon('save'), `Download, ${grpo.bytes(job.size)}`));
      }
      if (job.kind === 'import' && job.state === 'done') {
        this.tools.append(grpo.button('Open', () => grpo.go('live', { run: job.run }), { kind: 'small' }));
      }
      if (!busy) {
        const label = job.file ? `Delete the file of ${job.title}` : `Dismiss ${job.title}`;
        const away = h('button', { type: 'button', class: 'g-icon', title: job.file ? 'Delete the file' : 'Dismiss', 'aria-label': label }, grpo.icon(job.file ? 'trash' : 'close'));
        away.addEventListener('click', () => grpo.attempt(away, () => this.onDiscard(job.token)));
        this.tools.append(away);
      }
    }
  }
  grpo.system.jobLine = (job, options) => new JobLine(job, options);

  /* Where a bundle is dropped or chosen. */
  grpo.system.importCard = (onSend, limit) => {
    const input = h('input', { type: 'file', accept: '.zip,application/zip', class: 'g-system-file', 'aria-label': 'Bundle to import' });
    const again = h('input', { type: 'checkbox' });
    const drop = h('label', { class: 'g-system-drop' }, input, grpo.icon('upload'), h('span', {}, h('span', { class: 'g-strong' }, 'Choose a bundle'), ' or drop it here'),
      h('span', { class: 'g-faint g-small' }, `a .zip that Export has written, at most ${Math.round(limit() / MIB)} MiB`));
    const send = (file) => {
      if (!file) return undefined;
      input.value = '';
      if (file.size > limit()) return grpo.toast(`${file.name} has ${grpo.bytes(file.size)}; at most ${grpo.bytes(limit())} go through the browser. Use 'python -m grpo_engine import' for larger ones.`, 'error');
      return grpo.attempt(drop, () => onSend(file, again.checked));
    };
    input.addEventListener('change', () => send(input.files[0]));
    for (const name of ['dragover', 'dragleave', 'drop']) {
      drop.addEventListener(name, (event) => {
        event.preventDefault();
        drop.classList.toggle('g-system-over', name === 'dragover');
        if (name === 'drop') send(event.dataTransfer.files[0]);
      });
    }
    return h('section', { class: 'g-card g-stack g-tight', 'aria-label': 'Import' }, h('header', {}, h('h2', {}, 'Import a run')), drop,
      h('label', { class: 'g-check g-small' }, again, 'Also as a copy, when the run is here already'),
      h('p', { class: 'g-quiet g-small' }, 'An imported run is labelled \u201crecorded\u201d. It can be looked at, compared and tried; it can\u2019t go on.'));
  };

  /* Devices with their memory; a bar says how much of it is taken. */
  grpo.system.devices = (devices) => h('div', { class: 'g-stack g-tight' }, devices.map(({ name, label, free, total }) => {
    const known = free !== null && free !== undefined && total;
    const taken = known ? (total - free) / total : 0;
    return h('div', { class: 'g-system-device' }, h('div', { class: 'g-row' }, h('span', { class: 'g-strong' }, name), h('span', { class: 'g-quiet' }, label), h('span', { class: 'g-push' }, known ? `${grpo.bytes(free)} of ${grpo.bytes(total)} free` : 'memory not known yet')),
      known ? h('div', { class: 'g-bar', role: 'img', 'aria-label': `${name}: ${grpo.percent(taken)} of its memory taken` }, h('span', { style: { width: `${100 * taken}%` } })) : null);
  }));
})();
