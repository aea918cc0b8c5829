/* The gallery: a card a prompt, with its three arms; sorted, filtered and paged by the server.

   grpo.gallery.pictures.show(now, host); .row(index) a prompt in the present order; .find(id) its place in it */
'use strict';

(() => {
  const { h } = grpo;
  const gallery = grpo.gallery = grpo.gallery || {};
  const PAGE = 24;
  const SORTS = { gain: 'Gain, largest first', loss: 'Loss, largest first', judge: 'Judge fell most', tier: 'Tier', prompt: 'Prompt, A to Z' };
  const CHANGES = { '': 'All', gained: 'Gained', same: 'Same', lost: 'Lost' };

  let now = null, parts = null, key = '', turn = 0;
  const filter = { sort: 'gain', tier: '', change: '', search: '' };
  let rows = [], total = 0, scale = 1, loading = null, watcher = null;

  const ask = (more) => grpo.get('gallery/prompts', { run: now.run, at: now.overview.at, compare: now.compare, ...filter, ...more });

  // -- cards ------------------------------------------------------------------------------------------

  /* One arm of a prompt; `latent` says which of its pictures. */
  function arm(row, name, latent) {
    const label = gallery.name(name);
    const pictures = row.arms[name];
    if (!pictures) return h('figure', {}, h('figcaption', {}, label), h('div', { class: 'g-picture g-none' }, 'measured at the end'));
    const picture = pictures[latent] || pictures[0];
    const figure = h('figure', {}, h('figcaption', {}, label),
      h('button', { type: 'button', class: 'g-gallery-shot', 'aria-label': `Compare ${label.toLowerCase()}: ${row.text}`, onclick: () => open(row, name) },
        gallery.shot(picture.thumbnail || picture.image, `${label}: ${picture.rewrite === null ? row.text : picture.rewrite}`)),
      gallery.scores(picture), gallery.rewrite(row.text, name, picture));
    return figure;
  }

  function card(row) {
    const arms = gallery.arms(now.greedy);
    const node = h('article', { class: 'g-card g-gallery-card', data: { prompt: row.id } },
      h('header', {},
        h('button', { type: 'button', class: 'g-gallery-prompt', onclick: () => open(row) }, row.text),
        h('div', { class: 'g-gallery-change', title: 'Gain of the reward, mean over the pictures; the judge\u2019s below' },
          h('strong', {}, gallery.gainText(row.gain)), gallery.bar(row.gain, scale),
          h('div', {}, h('span', { class: 'g-chip' }, row.tier), row.judge_gain === null ? null : h('span', { class: 'g-quiet g-small' }, `judge ${gallery.gainText(row.judge_gain, 2)}`)))),
      h('div', { class: 'g-gallery-arms' }, arms.map((name) => arm(row, name, now.latent))));
    return node;
  }

  const open = (row, shown) => gallery.open(now, { index: rows.indexOf(row), shown }).catch((error) => grpo.toast(error.message, 'error'));

  // -- pages ------------------------------------------------------------------------------------------

  function restart() {
    const mine = turn += 1;
    loading = ask({ start: 0, count: PAGE }).then((page) => {
      if (mine !== turn) return undefined;
      if (!filter.tier || page.tiers.includes(filter.tier)) return begin(page);
      filter.tier = '';  // of another run: here nothing would be found, and its button is not there to take it back
      return restart();
    }).catch((error) => {
      if (mine === turn) failed(error);
      throw error;
    }).finally(() => { if (mine === turn) { loading = null; look(); } });
    return loading;
  }

  function begin(page) {
    rows = page.rows;
    total = page.total;
    scale = page.scale;
    const counts = page.counts;
    for (const change of Object.keys(CHANGES)) parts.change.label(change, `${CHANGES[change]} ${counts[change || 'all'].toLocaleString()}`);
    if (parts.tier.keys !== ['', ...page.tiers].join()) {
      const fresh = gallery.segments('Tier', { '': 'All tiers', ...Object.fromEntries(page.tiers.map((tier) => [tier, tier])) }, filter.tier, (tier) => again({ tier }));
      parts.tier.replaceWith(fresh);
      parts.tier = fresh;
    }
    parts.tier.hidden = page.tiers.length < 2;
    parts.grid.replaceChildren(...rows.map(card));
    said();
  }

  function more() {
    if (loading || rows.length >= total) return loading;
    const mine = turn;
    loading = ask({ start: rows.length, count: PAGE }).then((page) => {
      if (mine !== turn) return;
      rows.push(...page.rows);
      parts.grid.append(...page.rows.map(card));
      said();
    }).finally(() => { if (mine === turn) { loading = null; look(); } });
    return loading;
  }

  function said() {
    const left = total - rows.length;
    parts.foot.hidden = total > 0 && left === 0;
    grpo.text(parts.foot, total === 0 ? 'No prompt fits this search and these filters.' : `${rows.length.toLocaleString()} of ${total.toLocaleString()} prompts; scroll for more`);
  }

  /* The cards are of what was asked for before: they go, and the next look asks again. */
  function failed(error) {
    key = '';
    rows = [];
    total = 0;
    parts.grid.replaceChildren();
    parts.foot.hidden = false;
    grpo.text(parts.foot, error.message);
  }

  /* An observer tells only of changes: watch anew, so that a page that did not fill the window is followed by the next. */
  function look() {
    if (watcher) watcher.disconnect();
    if (rows.length >= total) return;
    watcher = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) more().catch((error) => grpo.toast(error.message, 'error')); }, { rootMargin: '600px' });
    watcher.observe(parts.foot);
  }

  function again(changes) {
    Object.assign(filter, changes);
    restart().catch((error) => grpo.toast(error.message, 'error'));
  }

  // -- what others ask --------------------------------------------------------------------------------

  /* The prompt at a place of the present order, and how many there are; null beyond its ends. */
  async function row(index) {
    if (loading) await loading;
    if (index < 0 || index >= total) return null;
    if (index < rows.length) return rows[index];
    if (index < rows.length + 4) {
      await more();
      return rows[index] || null;
    }
    const page = await ask({ start: index, count: 1 });
    return page.rows[0] || null;
  }

  /* The place of a prompt; filters that hide it are taken away first. */
  async function find(prompt) {
    if (loading) await loading;
    let page = await ask({ prompt, count: 1 });
    if (page.start === null && (filter.tier || filter.change || filter.search)) {
      Object.assign(filter, { tier: '', change: '', search: '' });
      parts.search.value = '';
      parts.change.choose('');
      parts.tier.choose('');
      await restart();
      page = await ask({ prompt, count: 1 });
    }
    if (page.start === null) throw new grpo.Failure('That prompt is not part of this measurement.', 'prompt', 404);
    return page.start;
  }

  function mount(host) {
    let typing = null;
    const search = h('input', { class: 'g-input', type: 'search', placeholder: 'Search prompts and rewrites', 'aria-label': 'Search prompts and rewrites', maxlength: 200,
      oninput: () => { clearTimeout(typing); typing = setTimeout(() => again({ search: search.value }), 200); } });
    const sort = h('select', { class: 'g-select', 'aria-label': 'Order', onchange: () => again({ sort: sort.value }) },
      Object.entries(SORTS).map(([value, text]) => h('option', { value }, text)));
    parts = {
      search,
      change: gallery.segments('Change', CHANGES, '', (change) => again({ change })),
      tier: gallery.segments('Tier', { '': 'All tiers' }, '', () => {}),
      latents: h('div', {}),
      grid: h('div', { class: 'g-gallery-grid' }),
      foot: h('p', { class: 'g-gallery-foot g-quiet', role: 'status' }),
    };
    host.append(h('div', { class: 'g-gallery-controls' }, search, parts.change, parts.tier, sort, parts.latents), parts.grid, parts.foot);
  }

  function latents() {
    const count = now.overview.latents;
    parts.latents.hidden = count < 2;
    const shown = Object.fromEntries(Array.from({ length: Math.min(count, 8) }, (_, index) => [index, String(index + 1)]));
    grpo.fill(parts.latents, h('span', { class: 'g-quiet g-small' }, 'Latents'), gallery.segments('Which of the shared latents', shown, now.latent, (index) => {
      now.latent = Number(index);
      parts.grid.replaceChildren(...rows.map(card));
    }));
  }

  gallery.pictures = {
    row, find,
    total: () => total,
    async show(state, host) {
      now = state;
      if (!parts) mount(host);
      latents();
      const fresh = JSON.stringify([now.overview.ids, now.compare]);
      if (fresh === key) return;
      key = fresh;
      await restart();
    },
  };
})();
