/* The film strip: one prompt over the steps of the run. */
'use strict';

(() => {
  const { h, fill } = grpo;
  const gallery = grpo.gallery = grpo.gallery || {};
  const KINDS = { measured: 'Validation prompts', trained: 'Training prompts' };
  let parts = null, now = null, run = null, kind = 'measured', prompt = null, shown = null, latent = 0, turn = 0;

  const where = { untrained: 'untrained', final: 'final', validation: '', training: '' };

  function frame(film, item) {
    const picture = item.pictures[latent] || item.pictures[0];
    const mean = item.mean === undefined || item.mean === null ? null : h('span', { class: 'g-gallery-score' }, h('span', { class: 'g-quiet' }, 'group mean'), ' ', gallery.fixed(item.mean, 1));
    const scores = 'clip' in picture ? gallery.scores(picture) : h('div', { class: 'g-gallery-scores' }, h('span', { class: 'g-gallery-score' }, h('span', { class: 'g-quiet' }, 'best reward'), ' ', gallery.fixed(picture.reward, 1)), mean);
    return h('figure', {}, h('figcaption', {}, h('strong', {}, `Step ${item.step.toLocaleString()}`), where[item.where] ? h('span', { class: 'g-quiet' }, ` ${where[item.where]}`) : null),
      gallery.shot(picture.image, `Step ${item.step}: ${picture.rewrite || film.text}`), scores, gallery.rewrite(film.text, 'trained', picture));
  }

  function strip() {
    const film = shown;
    const count = Math.max(...film.frames.map((item) => item.pictures.length));
    latent = Math.min(latent, count - 1);
    fill(parts.strip, h('div', { class: 'g-gallery-title' }, h('p', { class: 'g-gallery-asked' }, film.text), h('span', { class: 'g-chip' }, film.tier),
      count > 1 && count <= 8 ? [h('span', { class: 'g-quiet g-small' }, 'Latents'), gallery.segments('Which of the shared latents', Object.fromEntries(Array.from({ length: count }, (_, index) => [index, String(index + 1)])), latent, (index) => { latent = Number(index); strip(); })] : null),
    h('div', { class: 'g-gallery-strip', tabindex: 0, role: 'group', 'aria-label': 'Pictures by step' }, film.frames.map((item) => frame(film, item))),
    h('p', { class: 'g-quiet g-small' }, film.note));
  }

  async function choose(id) {
    const mine = turn += 1;
    prompt = id;
    parts.list.querySelectorAll('button').forEach((button) => button.setAttribute('aria-pressed', String(button.dataset.prompt === id)));
    const film = await grpo.get('gallery/film', { run, prompt: id, kind, greedy: now.greedy });
    if (mine !== turn) return;
    shown = film;
    strip();
  }

  const problem = (error) => grpo.toast(error.message, 'error');

  async function list() {
    const mine = run;
    const found = await grpo.get('gallery/films', { run, search: parts.search.value });
    if (mine !== run) return;
    if (!found.measured.total && kind === 'measured') kind = 'trained';
    parts.kinds.choose(kind);
    parts.kinds.hidden = !found.measured.total;
    parts.advice.hidden = found.measured.total > 0;
    grpo.text(parts.advice, 'This run has no validation measurements, which draw the same prompts on the same latents again and again. To get them, set \u201cevaluation.every\u201d (in all settings) to the number of steps between two of them, or press Evaluate now on the Live screen while a run goes on. Until then: its training prompts, at each step that trained on them.');
    const group = found[kind];
    fill(parts.list, group.prompts.map((item) => h('button', { type: 'button', class: 'g-gallery-pick', 'aria-pressed': String(item.id === prompt), data: { prompt: item.id }, onclick: () => choose(item.id).catch(problem) },
      h('span', {}, item.text), h('span', { class: 'g-quiet g-small', title: `${kind === 'measured' ? 'measured' : 'trained on'} ${item.count} times` }, `${item.count}\u00d7`))));
    grpo.text(parts.count, group.total === 0 ? 'This run has not trained yet.' : group.found > group.prompts.length ? `${group.prompts.length} of ${group.found.toLocaleString()} shown; search for others` : `${group.found.toLocaleString()} of ${group.total.toLocaleString()} prompts`);
    if (group.prompts.length && !group.prompts.some((item) => item.id === prompt)) await choose(group.prompts[0].id);
    else if (prompt && group.prompts.length) await choose(prompt);
    else fill(parts.strip, h('p', { class: 'g-quiet' }, group.total ? 'No prompt fits this search.' : 'Nothing to show yet.'));
  }

  gallery.film = {
    async show(state, host) {
      now = state;
      if (!parts) {
        let typing = null;
        parts = {
          advice: h('p', { class: 'g-gallery-note', hidden: true }), strip: h('div', { class: 'g-card g-gallery-film-strip' }),
          list: h('div', { class: 'g-gallery-picks' }), count: h('p', { class: 'g-quiet g-small' }),
          search: h('input', { class: 'g-input', type: 'search', placeholder: 'Search prompts', 'aria-label': 'Search prompts of the film strip', maxlength: 200, oninput: () => { clearTimeout(typing); typing = setTimeout(() => list().catch(problem), 200); } }),
          kinds: gallery.segments('Which prompts', KINDS, kind, (chosen) => { kind = chosen; prompt = null; list().catch(problem); }),
        };
        host.append(parts.advice, h('div', { class: 'g-gallery-film-two' }, h('div', { class: 'g-card g-stack g-tight' }, parts.kinds, parts.search, parts.list, parts.count), parts.strip));
      }
      if (run !== now.run) {
        run = now.run;
        kind = 'measured';
        prompt = shown = null;
        latent = 0;
      }
      await list();
    },
  };
})();
