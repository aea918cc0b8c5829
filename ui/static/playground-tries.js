/* What came of the playground's tries: grpo.tries.add(list, {job, body, columns, models, again}) puts a card on top. */
'use strict';

grpo.tries = (() => {
  const { h, fill, signed } = grpo;
  const POLL = 300;  // ms
  const KEPT = 12;  // cards; older ones go
  const CRISP = 256;  // pixels; larger pictures are scaled smoothly
  const fixed = (value) => value.toFixed(1).replace('-', '\u2212');
  const percent = (share) => grpo.percent(share).replace(' ', '\u00a0');
  const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

  // -- one column -------------------------------------------------------------------------------------

  function makeColumn(spec, count) {
    const at = {
      name: h('h3', { class: 'g-playground-title' }), figures: h('div', { class: 'g-playground-figures' }), words: h('div', { class: 'g-playground-words' }),
      pictures: h('div', { class: 'g-playground-grid', 'data-count': Math.min(count, 2) }), foot: h('div', { class: 'g-playground-foot' }),
    };
    const cells = Array.from({ length: count }, () => h('figure', { class: 'g-playground-cell' }, h('div', { class: 'g-picture g-none' }), count > 1 ? h('figcaption', { class: 'g-small g-quiet' }, '\u00a0') : null));
    at.pictures.append(...cells);
    const node = h('section', { class: 'g-playground-column' }, h('header', {}, at.name, at.figures), at.words, h('div', { class: 'g-playground-frame' }, at.pictures), at.foot);
    return { spec, at, cells, node, told: '', data: { pictures: Array(count).fill(null) } };
  }

  function nameOf({ spec, data }) {
    if (spec.kind !== 'checkpoint' || data.step === undefined) return spec.name;
    return /step/.test(spec.name) && spec.name.endsWith(`step ${data.step}`) ? spec.name : `${spec.name.replace(/(so far)?, step \d+$/, '')}, step ${data.step}`;
  }

  function drawCell(cell, picture, text, k, facts) {
    const [shown, caption] = cell.children;
    if (shown.dataset.token !== picture.token) {
      const image = h('img', { class: 'g-picture', src: `/grpo/playground/picture/${picture.token}.png`, alt: `Picture ${k + 1} of \u201c${text}\u201d`, draggable: 'false', 'data-token': picture.token });
      image.addEventListener('load', () => image.classList.toggle('g-smooth', image.naturalWidth > CRISP));
      image.addEventListener('error', () => image.replaceWith(h('div', { class: 'g-picture g-none', 'data-token': picture.token }, 'picture gone')));
      shown.replaceWith(image);
    }
    if (!caption) return;
    const judged = picture.judge === null || picture.judge === undefined ? null : h('span', { title: judgeHelp(facts) }, `${judgeName(facts)} ${percent(picture.judge)}`);
    fill(caption, h('span', { title: '100 \u00d7 cosine similarity of the picture and the prompt as typed' }, `CLIP ${fixed(picture.clip)}`), judged ? ' \u00b7 ' : null, judged);
  }

  const judgeName = (facts) => (facts.judge === 'checker' ? 'checker' : 'judge: yes');
  const judgeHelp = (facts) => (facts.judge === 'checker' ? 'Share of what the prompt asks for that the checker finds in the picture'
    : `How likely the untrained policy answers Yes to: ${facts.question || 'does the picture show the prompt?'}`);

  /* The mean, and how far it is from the pictures of the same latents without rewriting. */
  function drawFigures(column, base, facts) {
    const drawn = column.data.pictures.filter(Boolean);
    if (!drawn.length) return fill(column.at.figures);
    const average = mean(drawn.map((picture) => picture.clip));
    const pairs = base && base !== column ? column.data.pictures.flatMap((picture, k) => (picture && base.data.pictures[k] ? [picture.clip - base.data.pictures[k].clip] : [])) : [];
    const judged = mean(drawn.filter((picture) => picture.judge !== null && picture.judge !== undefined).map((picture) => picture.judge));
    const n = `mean of ${drawn.length} picture${drawn.length > 1 ? 's' : ''}`;
    return fill(column.at.figures,
      h('div', { title: `CLIP, 100 \u00d7 cosine with the prompt as typed; ${n}` }, h('span', { class: 'g-playground-clip' }, fixed(average)), h('span', { class: 'g-small g-quiet' }, ' CLIP')),
      h('div', { class: 'g-small g-quiet' },
        pairs.length ? h('span', { title: 'Mean difference from the pictures on the same latents without rewriting' }, `${signed(mean(pairs), 1)} against no rewriting`) : null,
        pairs.length && judged !== null ? ' \u00b7 ' : null,
        judged === null ? null : h('span', { title: judgeHelp(facts) }, `${judgeName(facts)} ${percent(judged)}`)));
  }

  function drawWords(column, prompt, ended) {
    const { data, spec, at } = column;
    if (column.editing) return;
    const notes = [];
    if (data.note) notes.push(data.note);
    if (data.finished === false) notes.push('Cut off at the policy\u2019s token limit.');
    if (data.cut) notes.push(grpo.readUpTo(data.cut));
    let words = h('span', { class: 'g-faint' }, ended ? 'Not made.' : '\u00a0');
    if (data.error) words = h('span', { class: 'g-bad-text', role: 'alert' }, data.error);
    else if (data.text && spec.kind === 'original') words = h('span', { class: 'g-quiet' }, data.cut ? grpo.read(data.text, data.unread, data.cut) : 'The prompt as it is.');
    else if (data.text) words = grpo.diff(prompt, data.text, data.unread, data.cut);
    else if (data.text === null) words = h('span', {}, 'Nothing in it can be drawn: ', h('q', { class: 'g-mono' }, data.completion || ''));
    fill(at.words, words, notes.map((note) => h('span', { class: 'g-small g-quiet' }, note)));
    at.pictures.hidden = Boolean(data.error);
    if (data.text === null || (ended && data.text === undefined)) {
      for (const cell of column.cells) if (cell.firstChild.tagName !== 'IMG') grpo.text(cell.firstChild, 'no picture');
    }
  }

  // -- one try ----------------------------------------------------------------------------------------

  function add(list, { job, body, columns, models, again }) {
    const facts = {};
    const made = columns.map((spec) => makeColumn(spec, body.pictures));
    const grid = h('div', { class: 'g-playground-columns' }, made.map((column) => column.node));
    const status = h('div', { class: 'g-row g-playground-status' });
    const how = body.greedy ? 'likeliest rewrite' : `sampled, seed ${body.sample_seed}${body.temperature === null ? '' : `, temperature ${body.temperature}`}`;
    const card = h('article', { class: 'g-card g-playground-try', 'aria-label': `Try: ${body.prompt}` },
      h('header', {}, h('h2', { class: 'g-playground-heading' }, body.prompt),
        h('button', { type: 'button', class: 'g-button small g-push', onclick: () => again(body) }, 'Use again'),
        h('button', { type: 'button', class: 'g-icon', 'aria-label': 'Remove this try', onclick: () => { state.removed = true; stop(); card.remove(); } }, grpo.icon('close'))),
      h('div', { class: 'g-row g-playground-facts' },
        h('p', { class: 'g-small g-quiet' }, [`latent seed ${body.latent_seed}`, how, models ? models.label : ''].filter(Boolean).join(' \u00b7 ')), status), grid);
    const state = { removed: false, job: null };
    list.prepend(card);
    if (card.getBoundingClientRect().top > window.innerHeight - 120) card.scrollIntoView({ block: 'start' });  // on a phone, below the form
    while (list.children.length > KEPT) list.lastChild.remove();

    const base = () => made.find((column) => column.spec.kind === 'original');

    function draw(column, ended) {
      const told = JSON.stringify([column.data, ended, column.editing, base() && base().data.pictures, facts.judge]);
      if (told === column.told) return;
      column.told = told;
      const dot = column.spec.number ? h('span', { class: 'g-playground-dot', style: { background: grpo.color(column.spec.number) } }) : null;
      fill(column.at.name, column.spec.kind === 'edited' ? [h('span', { class: 'g-chip changed' }, 'edited'), ' '] : null, dot, nameOf(column));
      drawWords(column, body.prompt, ended);
      column.data.pictures.forEach((picture, k) => { if (picture) drawCell(column.cells[k], picture, column.data.text, k, facts); });
      drawFigures(column, base(), facts);
      if (column.data.text && ended && !column.editing) {
        fill(column.at.foot, h('button', { type: 'button', class: 'g-button small', onclick: () => edit(column) }, grpo.icon('edit'), 'Edit'));
      }
    }

    function edit(column) {
      column.editing = true;
      const area = h('textarea', {
        class: 'g-input', rows: 4, maxlength: 4000, 'aria-label': `Rewrite by hand, from ${nameOf(column)}`,
        onkeydown: (event) => {
          if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); render.click(); }
          if (event.key === 'Escape') close();
        },
      });
      area.value = column.data.text;
      const close = () => {
        column.editing = false;
        draw(column, true);
        column.at.foot.querySelector('button').focus();
      };
      const render = grpo.button('Render again', async () => {
        const text = area.value;
        const one = { ...body, columns: [{ kind: 'edited', text }] };
        const { job: next } = await grpo.post('playground/generate', one);
        const spec = { kind: 'edited', name: column.spec.kind === 'edited' ? column.spec.name : `from ${nameOf(column)}`, number: column.spec.number };
        const fresh = makeColumn(spec, body.pictures);
        column.node.after(fresh.node);
        made.splice(made.indexOf(column) + 1, 0, fresh);
        close();
        follow(next, [fresh]);
      }, { kind: 'primary small', title: 'Ctrl or Command + Enter' });
      fill(column.at.words, area);
      fill(column.at.foot, render, h('button', { type: 'button', class: 'g-button small', onclick: close }, 'Cancel'));
      area.focus();
    }

    const stop = () => { if (state.job) grpo.post('playground/cancel', { job: state.job }).catch(() => {}); };

    const bar = h('span', {});
    const says = h('span', { class: 'g-quiet', role: 'status' });
    const progress = [h('div', { class: 'g-bar g-playground-bar' }, bar), says, h('button', { type: 'button', class: 'g-button small', onclick: stop }, 'Cancel')];

    function drawStatus(job) {
      const ended = job.state !== 'waiting' && job.state !== 'working';
      card.setAttribute('aria-busy', String(!ended));
      if (job.state === 'failed') fill(status, h('span', { class: 'g-bad-text', role: 'alert' }, job.error));
      else if (job.state === 'cancelled') fill(status, h('span', { class: 'g-quiet' }, 'Cancelled.'));
      else if (job.state === 'done') fill(status);
      else {
        if (says.parentNode !== status) fill(status, progress);
        bar.style.width = job.total ? `${(100 * job.done) / job.total}%` : '0';
        const counted = job.total ? `${job.phase} ${job.done + 1} of ${job.total}` : job.phase;
        grpo.text(says, job.state === 'waiting' ? `waiting, ${job.position === 1 ? 'one try' : `${job.position} tries`} before this one` : counted || 'starting');
      }
      return ended;
    }

    /* Ask for the job until it ended, and show what is new of it in `own` columns. */
    async function follow(id, own) {
      state.job = id;
      let lost = 0;
      for (;;) {
        let job;
        try {
          job = await grpo.get('playground/job', { id });
          lost = 0;
        } catch (error) {
          if (error.status === 0 && lost < 40) lost += 1;  // the app may be back in a moment
          else job = { state: 'failed', error: error.message, columns: [] };
        }
        if (state.removed) return;
        if (job) {
          facts.judge = job.judge || facts.judge;
          facts.question = job.question || facts.question;
          own.forEach((column, index) => { if (job.columns[index]) column.data = job.columns[index]; });
          const ended = drawStatus(job);
          for (const column of made) draw(column, own.includes(column) ? ended : column.ended);
          if (ended) {
            for (const column of own) column.ended = true;
            if (state.job === id) state.job = null;
            return;
          }
        }
        await new Promise((resolve) => { setTimeout(resolve, POLL); });
      }
    }

    follow(job, made.slice());
  }

  return { add };
})();
