/* The screen of runs and system: what every run takes and how to take it along, the queue, the machine. */
'use strict';

(() => {
  const { h } = grpo;
  const JOB_MS = 400;  // between looks at a job that goes on
  const DISK_S = 15, MACHINE_S = 10;
  let rows = new Map(), order = [], version = '';
  let disk = { runs: {}, database: 0, free: 0, measuring: true };
  let machine = null;
  let jobs = [];
  let parts = null;
  let visible = false;
  let diskAt = 0, machineAt = 0, timer = null, asking = null;
  const lines = new Map(), jobLines = new Map();

  async function look() {
    if (asking) return asking;
    asking = (async () => {
      const told = await grpo.get('system/state', { since: version });
      version = told.table.version;
      const there = new Set(told.table.ids);
      rows = new Map([...rows].filter(([id]) => there.has(id)));
      for (const run of told.table.runs) rows.set(run.id, run);
      order = told.table.ids;
      jobs = told.jobs;
      drawRuns();
      drawQueue(told.queue);
      drawJobs();
    })().finally(() => {
      asking = null;
      watchJobs();
    });
    return asking;
  }

  const busy = ({ state }) => state === 'waiting' || state === 'working';

  /* Look again soon while a job goes on, after a look that was lost too. */
  function watchJobs() {
    clearTimeout(timer);
    if (visible && jobs.some(busy)) timer = setTimeout(() => look().catch(() => undefined), JOB_MS);
  }

  async function lookAtDisk(force) {
    const now = Date.now() / 1000;
    if (!force && now - diskAt < DISK_S) return;
    diskAt = now;
    try {
      disk = await grpo.get('system/disk');
      drawDisk();
    } finally {  // a look that was lost does not end the measuring
      if (disk.measuring && visible) setTimeout(() => { if (visible) lookAtDisk(true).catch(() => undefined); }, 700);
    }
  }

  async function lookAtMachine(force) {
    const now = Date.now() / 1000;
    const engineCame = machine && machine.engine !== grpo.pulse.worker.engine;
    if (!force && !engineCame && now - machineAt < MACHINE_S) return;
    machineAt = now;
    machine = await grpo.get('system/machine');
    drawMachine();
  }

  async function refresh(force = false) {
    await Promise.all([look(), lookAtDisk(force), lookAtMachine(force)]);
  }

  // -- runs -------------------------------------------------------------------------------------------

  function drawRuns() {
    for (const [id, line] of lines) {
      if (!rows.has(id)) {
        line.node.remove();
        lines.delete(id);
      }
    }
    order.forEach((id, index) => {
      const run = rows.get(id);
      let line = lines.get(id);
      if (!line) lines.set(id, line = newLine(id));
      if (parts.runs.children[index] !== line.node) parts.runs.insertBefore(line.node, parts.runs.children[index] || null);
      grpo.text(line.name, run.name);
      grpo.fill(line.recorded, run.recorded ? recorded() : null);
      grpo.fill(line.state, grpo.state(run.state));
      line.remove.disabled = run.active;
      line.remove.title = run.active ? `The run is ${run.state}: stop it before deleting it` : 'Delete the run';
      line.remove.setAttribute('aria-label', `Delete ${run.name}`);
      line.take.setAttribute('aria-label', `Export ${run.name}`);
    });
    parts.noRuns.hidden = order.length > 0;
    parts.table.hidden = !order.length;
    drawDisk();
  }

  const recorded = () => h('span', { class: 'g-chip', title: 'Imported from a bundle, such as the example that came with the program; delete it whenever you like' }, 'recorded');

  function newLine(id) {
    const line = { name: h('a', { href: `#live?run=${encodeURIComponent(id)}`, title: id }), state: h('td', { class: 'g-system-state' }) };
    line.recorded = h('span');
    line.sizes = ['pictures', 'checkpoints', 'other', 'total'].map((kind) => h('td', { class: ['g-number', kind !== 'total' && 'g-system-part'] }));
    line.take = grpo.button('Export', () => grpo.system.exportDialog(rows.get(id), uploadLimit(), beginExport), { kind: 'small' });
    line.remove = h('button', { type: 'button', class: 'g-icon' }, grpo.icon('trash'));
    line.remove.addEventListener('click', () => grpo.attempt(line.remove, () => removeRun(id)));
    line.node = h('tr', { data: { run: id } }, h('td', {}, h('span', { class: 'g-row g-system-name' }, line.name, line.recorded)), line.state, line.sizes,
      h('td', { class: 'g-system-tools' }, h('span', { class: 'g-row' }, line.take, line.remove)));
    return line;
  }

  async function removeRun(id) {
    const run = rows.get(id);
    const size = disk.runs[id] ? ` That frees ${grpo.bytes(total(disk.runs[id]))}.` : '';
    if (!await grpo.confirm(`${run.name}: metrics, rewrites, pictures and checkpoints go, and can\u2019t be brought back.${size}`, 'Delete the run', 'danger')) return;
    await grpo.post('compare/delete', { runs: [id] });
    await look();
    await lookAtDisk(true);
  }

  async function beginExport(body) {
    await grpo.post('system/export', body);
    await look();
    parts.jobsCard.scrollIntoView({ block: 'nearest' });
  }

  const total = (sizes) => sizes.pictures + sizes.checkpoints + sizes.other;

  function drawDisk() {
    let all = 0;
    for (const [id, line] of lines) {
      const sizes = disk.runs[id];
      const values = sizes ? [sizes.pictures, sizes.checkpoints, sizes.other, total(sizes)] : [null, null, null, null];
      values.forEach((value, index) => grpo.text(line.sizes[index], value === null ? '\u2026' : grpo.bytes(value)));
      all += sizes ? total(sizes) : 0;
    }
    const measured = disk.measuring ? ' (still measuring)' : '';
    grpo.text(parts.disk, order.length ? `${grpo.bytes(all)} in runs${measured}, ${grpo.bytes(disk.database)} in the database, ${grpo.bytes(disk.free)} free on the disk` : '');
  }

  // -- queue, jobs ------------------------------------------------------------------------------------

  function drawQueue(queue) {
    const act = (label, path, id, kind) => grpo.button(label, async () => { await grpo.post(path, { run: id }); await look(); }, { kind: `small ${kind}` });
    const shown = JSON.stringify(queue);
    if (shown === parts.queueShown) return;
    parts.queueShown = shown;
    parts.queue.replaceChildren(...queue.waiting.map((run, index) => h('li', {}, h('span', { class: 'g-quiet' }, `${index + 1}.`), h('span', { class: 'g-system-told' }, run.name), h('span', { class: 'g-quiet g-small' }, `${run.total} steps`), act('Take out', 'system/queue/remove', run.id, ''))),
      ...queue.forgotten.map((run) => h('li', { class: 'g-system-forgotten' }, h('span', { class: 'g-system-told' }, run.name, h('span', { class: 'g-quiet g-small g-system-line' }, 'left behind when an app was closed')), act('Put back', 'system/queue/put-back', run.id, 'primary'), act('Drop', 'system/queue/remove', run.id, ''))));
    parts.queueEmpty.hidden = queue.waiting.length + queue.forgotten.length > 0;
    grpo.text(parts.queueEmpty, queue.current ? 'A run is being worked on; none waits behind it.' : 'No run waits.');
  }

  function drawJobs() {
    const mine = jobs.filter(({ kind }) => kind === 'export' || kind === 'import');
    const tokens = new Set(mine.map(({ token }) => token));
    for (const [token, line] of jobLines) {
      if (!tokens.has(token)) {
        line.node.remove();
        jobLines.delete(token);
      }
    }
    mine.forEach((job, index) => {
      let line = jobLines.get(job.token);
      if (line) line.update(job);
      else jobLines.set(job.token, line = grpo.system.jobLine(job, { onDiscard: async (token) => { await grpo.post('system/discard', { token }); await look(); } }));
      if (parts.jobs.children[index] !== line.node) parts.jobs.insertBefore(line.node, parts.jobs.children[index] || null);
    });
    parts.jobsCard.hidden = !mine.length;
    drawChecks();
  }

  // -- machine, checks --------------------------------------------------------------------------------

  const uploadLimit = () => (machine ? machine.upload_limit : 32 * 2 ** 20);

  function drawMachine() {
    grpo.fill(parts.devices, grpo.system.devices(machine.devices));
    grpo.text(parts.python, `Python ${machine.python} on ${machine.system}; this app takes ${grpo.bytes(machine.process)}.`);
    const packages = Object.entries(machine.versions);
    grpo.fill(parts.versions, packages.length ? packages.map(([name, found]) => h('div', {}, h('dt', {}, name), h('dd', { class: found ? null : 'g-bad-text' }, found || 'missing')))
      : h('p', { class: 'g-quiet' }, machine.engine === 'failed' ? 'The engine could not be loaded.' : 'Shown when the engine is loaded.'));
    grpo.text(parts.path, machine.database.path);
  }

  function drawChecks() {
    const newest = (kind) => jobs.find((job) => job.kind === kind);
    for (const [kind, node, verb] of [['check', parts.checkTold, parts.check], ['doctor', parts.doctorTold, parts.doctor]]) {
      const job = newest(kind);
      verb.disabled = Boolean(job) && busy(job);
      if (!job) continue;
      const shown = JSON.stringify([job.token, job.state, job.message]);
      if (node.dataset.shown === shown) continue;
      node.dataset.shown = shown;
      const problems = job.result ? job.result.problems : [];
      const when = job.finished ? ` (${new Date(job.finished * 1000).toLocaleTimeString()})` : '';
      grpo.fill(node, problems.length ? h('span', { class: 'g-bad-text' }, `${problems.length} problem${problems.length === 1 ? '' : 's'} found${when}; see above.`) : h('span', { class: job.state === 'failed' ? 'g-bad-text' : 'g-quiet' }, `${job.message}${busy(job) ? '' : when}`));
      const plan = job.result && job.result.placement;
      if (plan) grpo.add(node, [h('span', { class: 'g-quiet g-small g-system-line' }, `With ${job.result.settings}: ${plan}.`)]);
    }
    const found = [...new Set(['check', 'doctor'].flatMap((kind) => { const job = newest(kind); return job && job.result ? job.result.problems : []; }))];
    parts.problems.hidden = !found.length;
    grpo.fill(parts.problemList, found.map((text) => h('li', {}, text)));
  }

  // -- the page ---------------------------------------------------------------------------------------

  function mount(root) {
    const runs = h('tbody'), jobList = h('ul', { class: 'g-system-list' }), queueList = h('ol', { class: 'g-system-list g-system-queue' });
    const table = h('div', { class: 'g-scroll' }, h('table', { class: 'g-table' }, h('thead', {}, h('tr', {}, h('th', { scope: 'col' }, 'Run'), h('th', { scope: 'col', class: 'g-system-state' }, 'State'),
      ['Pictures', 'Checkpoints', 'Other', 'Total'].map((label) => h('th', { scope: 'col', class: ['g-number', label !== 'Total' && 'g-system-part'] }, label)), h('th', { scope: 'col' }, h('span', { class: 'g-system-hidden' }, 'Actions')))), runs));
    parts = {
      runs, table, jobs: jobList, queue: queueList, disk: h('span', { class: 'g-quiet g-small' }),
      noRuns: h('div', { hidden: true }, grpo.empty('No runs yet', 'Start one, or import the bundle of a run that was recorded elsewhere.', grpo.button('Set up a run', () => grpo.go('train'), { kind: 'primary' }))),
      queueEmpty: h('p', { class: 'g-quiet' }), devices: h('div'), python: h('p', { class: 'g-quiet g-small' }), versions: h('dl', { class: 'g-system-versions' }), path: h('span', { class: 'g-mono g-system-path' }),
      checkTold: h('p', { class: 'g-small', role: 'status' }, 'Reads the whole database and looks for damage.'),
      doctorTold: h('p', { class: 'g-small g-quiet', role: 'status' }, 'Looks for missing packages and models, and at what the preset \u201ctiny\u201d needs here.'),
      problemList: h('ul'),
    };
    parts.check = grpo.button('Check the database', async () => { await grpo.post('system/check'); await look(); }, { kind: 'small' });
    parts.doctor = grpo.button('Check now', async () => { await grpo.post('system/doctor'); await look(); }, { kind: 'small' });
    parts.problems = h('section', { class: 'g-card g-system-problems', hidden: true, role: 'alert' }, h('h2', {}, 'Problems'), parts.problemList);
    parts.jobsCard = h('section', { class: 'g-card', 'aria-label': 'Exports and imports', hidden: true }, h('header', {}, h('h2', {}, 'Exports and imports'), h('span', { class: 'g-quiet g-small g-push' }, 'Files are kept until the app is started again')), jobList);
    const importCard = grpo.system.importCard(async (file, again) => {
      await grpo.send(`system/import${again ? '?again=true' : ''}`, file);
      await look();
    }, uploadLimit);
    root.append(h('div', { class: 'g-stack' }, parts.problems,
      h('section', { class: 'g-card', 'aria-label': 'Runs on the disk' }, h('header', { class: 'g-system-bar' }, h('h2', {}, 'Runs'), parts.disk), table, parts.noRuns), parts.jobsCard,
      h('div', { class: 'g-system-columns' },
        h('div', { class: 'g-stack' },
          h('section', { class: 'g-card', 'aria-label': 'Queue' }, h('header', {}, h('h2', {}, 'Queue')), queueList, parts.queueEmpty),
          h('section', { class: 'g-card g-stack g-tight', 'aria-label': 'This machine' }, h('header', {}, h('h2', {}, 'This machine'), h('span', { class: 'g-push' }, parts.doctor)), parts.devices, parts.python, parts.doctorTold, h('h3', {}, 'Versions'), parts.versions)),
        h('div', { class: 'g-stack' },
          importCard,
          h('section', { class: 'g-card g-stack g-tight', 'aria-label': 'Database' }, h('header', {}, h('h2', {}, 'Database'), h('span', { class: 'g-push' }, parts.check)), parts.path, parts.checkTold)))));
  }

  grpo.screen('system', {
    mount,
    show() { visible = true; return refresh(true); },
    hide() { visible = false; clearTimeout(timer); },
    change() { return refresh(); },
  });
})();
