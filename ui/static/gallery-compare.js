/* One prompt, large: a divider to drag, side by side, or one picture over the other.

   grpo.gallery.open(now, {index | prompt, shown})    index: place in the gallery's present order */
'use strict';

(() => {
  const { h, fill } = grpo;
  const gallery = grpo.gallery = grpo.gallery || {};
  const MODES = { slider: 'Slider', side: 'Side by side', flip: 'Flip' };
  const SMALL = 256;  // pixels: pictures up to this size grow by whole numbers only, so that they stay crisp

  let view = null;  // of the dialog that is open

  /* The largest side for a picture of `natural` pixels that has `room`. */
  function fitting(natural, room) {
    if (!natural) return room;
    if (natural <= SMALL) return Math.max(1, Math.floor(room / natural)) * natural;
    return Math.min(room, natural);
  }

  function resize() {
    if (!view) return;
    const { stage, mode, natural } = view;
    const sides = mode === 'side' ? 2 : 1;
    const width = Math.floor((stage.parentNode.clientWidth - 16 * (sides - 1)) / sides);
    const height = Math.max(window.innerHeight - (window.innerWidth < 720 ? 430 : 330), 192);
    stage.style.setProperty('--side', `${fitting(natural, Math.min(width, height))}px`);
  }

  const pictures = (name) => view.row.arms[name] || null;
  const at = (name) => pictures(name) && (pictures(name)[view.latent] || pictures(name)[0]);

  function image(name) {
    const picture = at(name);
    const node = gallery.shot(picture.image, `${gallery.name(name)}: ${picture.rewrite || view.row.text}`, { loading: 'eager' });
    node.addEventListener('load', () => {
      if (view && view.natural !== node.naturalWidth) {
        view.natural = node.naturalWidth;
        resize();
      }
    });
    return node;
  }

  const tag = (name, side) => h('span', { class: `g-gallery-tag ${side}` }, gallery.name(name));

  // -- the three ways ---------------------------------------------------------------------------------

  function slider([one, other]) {
    const over = h('div', { class: 'over' }, image(other));
    const handle = h('div', { class: 'g-gallery-divider', role: 'slider', tabindex: 0, 'aria-label': `Divider between ${gallery.name(one).toLowerCase()} and ${gallery.name(other).toLowerCase()}`, 'aria-valuemin': 0, 'aria-valuemax': 100 });
    const stage = h('div', { class: 'g-gallery-frame' }, image(one), over, tag(one, 'left'), tag(other, 'right'), handle);
    const move = (percent) => {
      view.cut = Math.min(100, Math.max(0, percent));
      stage.style.setProperty('--cut', `${view.cut}%`);
      handle.setAttribute('aria-valuenow', Math.round(view.cut));
      handle.setAttribute('aria-valuetext', `${Math.round(view.cut)} % ${gallery.name(one).toLowerCase()}`);
    };
    const follow = (event) => {
      const box = stage.getBoundingClientRect();
      move((event.clientX - box.left) / box.width * 100);
    };
    stage.addEventListener('pointerdown', (event) => {
      stage.setPointerCapture(event.pointerId);
      follow(event);
    });
    stage.addEventListener('pointermove', (event) => { if (stage.hasPointerCapture(event.pointerId)) follow(event); });
    handle.addEventListener('keydown', (event) => {
      const step = { ArrowLeft: -5, ArrowRight: 5, Home: -100, End: 100 }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      move(view.cut + step);
    });
    move(view.cut);
    return [stage];
  }

  const side = (two) => two.map((name) => h('div', { class: 'g-gallery-frame' }, image(name), tag(name, 'left')));

  function flip(two) {
    const shown = two[view.flipped ? 0 : 1];
    return [h('div', { class: 'g-gallery-frame g-gallery-flip', onclick: () => turn() },
      two.map((name) => h('div', { class: 'over', style: { visibility: name === shown ? 'visible' : 'hidden' } }, image(name))), tag(shown, 'left'))];
  }

  function turn() {
    view.flipped = !view.flipped;
    if (view.mode !== 'flip') setMode('flip');
    else {  // no new pictures: the same two, the other one visible
      const two = pair();
      const shown = two[view.flipped ? 0 : 1];
      view.stage.querySelectorAll('.over').forEach((node, index) => { node.style.visibility = two[index] === shown ? 'visible' : 'hidden'; });
      grpo.text(view.stage.querySelector('.g-gallery-tag'), gallery.name(shown));
    }
  }

  // -- the dialog -------------------------------------------------------------------------------------

  /* The last two arms that were chosen, in their natural order. */
  const pair = () => view.arms.filter((name) => view.chosen.includes(name));

  function draw() {
    const { row } = view;
    const two = pair();
    view.buttons.forEach((button, index) => {
      button.disabled = !pictures(view.arms[index]);
      button.setAttribute('aria-pressed', String(two.includes(view.arms[index])));
    });
    const ways = { slider, side, flip };
    view.stage.className = `g-gallery-stage ${view.mode}`;
    view.stage.replaceChildren(...(two.length < 2 ? side(two) : ways[view.mode](two)));
    resize();
    fill(view.texts, two.map((name) => h('section', {}, h('h3', {}, gallery.name(name)), gallery.scores(at(name)), gallery.rewrite(row.text, name, at(name)))));
    grpo.text(view.prompt, row.text);
    grpo.text(view.tier, row.tier);
    grpo.text(view.place, `${(view.index + 1).toLocaleString()} of ${gallery.pictures.total().toLocaleString()}`);
    grpo.text(view.gain, `gain ${gallery.gainText(row.gain)}${row.judge_gain === null ? '' : `, judge ${gallery.gainText(row.judge_gain, 2)}`}`);
    view.before.disabled = view.index === 0;
    view.next.disabled = view.index + 1 >= gallery.pictures.total();
  }

  function setMode(mode) {
    view.mode = mode;
    view.modes.choose(mode);
    grpo.remember('gallery.mode', mode);
    draw();
    view.content.focus();
  }

  function choose(number) {
    const name = view.arms[number];
    if (!name || !pictures(name)) return;
    view.chosen = [view.chosen.filter((other) => other !== name).pop(), name].filter(Boolean);
    view.flipped = pair()[0] === name;
    draw();
  }

  async function go(index) {
    const mine = view;
    const row = await gallery.pictures.row(index);
    if (!row || view !== mine) return;
    view.row = row;
    view.index = index;
    gallery.note(row.id);
    draw();
  }

  function latent(step) {
    const count = view.now.overview.latents;
    view.latent = (view.latent + step + count) % count;
    if (view.latents) view.latents.choose(view.latent);
    draw();
  }

  function key(event) {
    if (event.target.matches('input, select, textarea') || event.ctrlKey || event.metaKey || event.altKey) return;
    const button = event.target.closest('button');
    const actions = {
      ArrowLeft: () => go(view.index - 1), ArrowRight: () => go(view.index + 1), ArrowUp: () => latent(-1), ArrowDown: () => latent(1),
      1: () => choose(0), 2: () => choose(1), 3: () => choose(2), f: turn, F: turn, ' ': button ? null : turn,
    };
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    Promise.resolve(action()).catch((error) => grpo.toast(error.message, 'error'));
  }

  function build(now) {
    const step = (label, glyph, by) => h('button', { type: 'button', class: 'g-icon', 'aria-label': label, title: label, onclick: () => go(view.index + by).catch((error) => grpo.toast(error.message, 'error')) }, grpo.icon(glyph));
    const hint = (keys, text) => h('span', {}, keys.map((name) => h('kbd', {}, name)), ' ', text);
    view.prompt = h('p', { class: 'g-gallery-asked' });
    view.tier = h('span', { class: 'g-chip' });
    view.gain = h('span', { class: 'g-quiet g-push' });
    view.place = h('span', { class: 'g-quiet g-small' });
    view.before = step('Previous prompt', 'left', -1);
    view.next = step('Next prompt', 'right', 1);
    view.modes = gallery.segments('How to compare', MODES, view.mode, setMode);
    view.buttons = view.arms.map((name, index) => h('button', { type: 'button', 'aria-pressed': 'false', onclick: () => { choose(index); view.content.focus(); } }, gallery.name(name)));
    const count = now.overview.latents;
    view.latents = count > 1 && count <= 8 ? gallery.segments('Which of the shared latents', Object.fromEntries(Array.from({ length: count }, (_, index) => [index, String(index + 1)])), view.latent, (index) => { view.latent = Number(index); draw(); }) : null;
    view.stage = h('div', { class: 'g-gallery-stage' });
    view.texts = h('div', { class: 'g-gallery-texts' });
    view.content = h('div', { class: 'g-gallery-compare', tabindex: -1, autofocus: true },
      h('div', { class: 'g-gallery-asking' }, h('div', { class: 'g-gallery-title' }, view.prompt, view.tier),
        h('div', { class: 'g-row' }, view.place, view.before, view.next, h('button', { type: 'button', class: 'g-icon', 'aria-label': 'Close', title: 'Close', onclick: () => view.close() }, grpo.icon('close')))),
      h('div', { class: 'g-gallery-tools' }, view.modes, h('div', { class: 'g-segments', role: 'group', 'aria-label': 'The two that are compared' }, view.buttons),
        view.latents ? h('div', { class: 'g-row' }, h('span', { class: 'g-quiet g-small' }, 'Latents'), view.latents) : null, view.gain),
      view.stage, view.texts,
      h('p', { class: 'g-gallery-hints' }, hint(['\u2190', '\u2192'], 'prompts (or the divider, once it has the focus)'), hint(['1', '2', '3'], 'arms'), hint(['F', 'Space'], 'flip'),
        count > 1 ? hint(['\u2191', '\u2193'], 'latents') : null, hint(['Esc'], 'close')));
    return view.content;
  }

  gallery.open = async function open(now, { index, prompt, shown }) {
    const place = prompt === undefined ? index : await gallery.pictures.find(prompt);
    const row = await gallery.pictures.row(place);
    if (!row || view) return;
    const comparison = now.overview.comparisons.find((item) => item.name === now.compare);
    const arms = gallery.arms(now.greedy);
    const chosen = [comparison.before, comparison.after];
    if (shown && !chosen.includes(shown)) chosen.splice(0, 1, shown);
    view = { now, arms, chosen, row, index: place, latent: now.latent, cut: 50, flipped: false, natural: 0, mode: grpo.recall('gallery.mode', 'slider') };
    if (!MODES[view.mode]) view.mode = 'slider';
    const { node, close, closed } = grpo.dialog('Compare', build(now));
    view.close = () => close();
    node.classList.add('g-large', 'g-gallery-dialog');
    node.addEventListener('keydown', key);
    window.addEventListener('resize', resize);
    draw();
    view.content.focus();
    gallery.note(row.id);
    await closed;
    window.removeEventListener('resize', resize);
    const left = row.id;
    view = null;
    gallery.note();
    const card = document.querySelector(`.g-gallery-card[data-prompt="${CSS.escape(left)}"] .g-gallery-prompt`);
    if (card) card.focus({ preventScroll: true });
  };
})();
