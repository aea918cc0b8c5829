/* What the parts of the Before / after screen share.

   grpo.gallery.name(arm), .arms(greedy), .shot(path, alt), .scores(picture), .rewrite(text, arm, picture),
   .interval(gain), .bar(gain, scale), .segments(label, options, chosen, onpick), .gainText(value) */
'use strict';

(() => {
  const { h, signed } = grpo;
  const NAMES = { original: 'Original', untrained: 'Untrained', trained: 'Trained' };
  const CRISP = 256;  // pictures up to this many pixels are shown with their pixels

  const name = (arm) => NAMES[arm.replace('_greedy', '')] || arm;

  /* The three arms side by side, those not measured yet included. */
  const arms = (greedy) => ['original', `untrained${greedy ? '_greedy' : ''}`, `trained${greedy ? '_greedy' : ''}`];

  function shot(path, alt, attributes = {}) {
    const node = grpo.picture(path, alt, attributes);
    if (!path) return node;
    node.addEventListener('load', () => node.classList.toggle('g-smooth', node.naturalWidth > CRISP));
    node.addEventListener('error', () => node.replaceWith(h('div', { class: 'g-picture g-none', role: 'img', 'aria-label': 'picture is gone' }, 'picture is gone')), { once: true });
    return node;
  }

  const score = (label, value, title) => h('span', { class: 'g-gallery-score', title }, h('span', { class: 'g-quiet' }, label), ' ', value);
  const fixed = (value, places) => (value === null || value === undefined ? '\u2013' : value.toFixed(places).replace('-', '\u2212'));

  /* A picture's numbers: CLIP, the reward where it is something else, the judge. */
  function scores(picture) {
    const out = [];
    if (picture.clip !== null && picture.clip !== undefined) out.push(score('CLIP', fixed(picture.clip, 1), '100 x cosine between picture and original prompt'));
    if (out.length === 0 || Math.abs(picture.reward - picture.clip) >= 0.05) out.push(score('reward', fixed(picture.reward, 1), 'what training raises: CLIP and the other parts, weighted'));
    if (picture.judge !== null && picture.judge !== undefined) {
      const counted = picture.right ? `: ${picture.right[0]} of ${picture.right[1]} attributes right` : '';
      out.push(score('judge', fixed(picture.judge, 2), `a second measure, never trained on, 0 to 1${counted}`));
    }
    return h('div', { class: 'g-gallery-scores' }, out);
  }

  /* A rewrite, its difference from the original prompt marked, and what of it the image model does not read. */
  function rewrite(text, arm, picture) {
    const cut = picture.unread ? h('span', { class: 'g-small g-quiet g-gallery-cut' }, grpo.readUpTo(picture.cut)) : null;
    if (arm === 'original') return h('p', { class: 'g-gallery-text g-quiet' }, cut ? grpo.read(picture.rewrite, picture.unread, picture.cut) : 'as written', cut);
    if (picture.rewrite === null) return h('p', { class: 'g-gallery-text g-bad-text' }, 'no usable rewrite: scored as a failure');
    return h('p', { class: 'g-gallery-text' }, grpo.diff(text, picture.rewrite, picture.unread, picture.cut), cut);
  }

  /* Point and whisker against zero; `from` and `to` fix the scale, else it reaches from 0 to the whisker. */
  function interval({ mean, low, high }, { zero = 0, from = null, to = null, label = '0' } = {}) {
    const least = from === null ? Math.min(zero, low) : from, most = to === null ? Math.max(zero, high) : to;
    const at = (value) => `${(4 + 92 * (value - least) / (most - least || 1)).toFixed(2)}%`;
    const line = (x1, x2, y1, y2, kind) => h('line', { x1, x2, y1, y2, class: kind });
    return h('div', { class: 'g-gallery-interval', 'aria-hidden': 'true' },
      h('svg', { width: '100%', height: 26 },
        line('0%', '100%', 13, 13, 'axis'), line(at(zero), at(zero), 1, 25, 'zero'),
        line(at(low), at(high), 13, 13, 'whisker'), line(at(low), at(low), 8, 18, 'whisker'), line(at(high), at(high), 8, 18, 'whisker'),
        h('circle', { cx: at(mean), cy: 13, r: 5.5, class: 'point' })),
      h('span', { style: { left: at(zero) } }, label));
  }

  /* A gain as a bar to the right of zero, a loss to the left; the whole width is twice `scale`. */
  function bar(gain, scale) {
    if (gain === null) return h('div', { class: 'g-gallery-bar' });
    const share = Math.min(1, Math.abs(gain) / (scale || 1)) * 50;
    return h('div', { class: 'g-gallery-bar', 'aria-hidden': 'true' },
      h('span', { class: gain < 0 ? 'lost' : 'gained', style: { left: `${gain < 0 ? 50 - share : 50}%`, width: `${share}%` } }));
  }

  /* Buttons of which one is pressed; .choose(key) changes it from outside, .label(key, text) what it says. */
  function segments(label, options, chosen, onpick) {
    const buttons = {};
    const node = h('div', { class: 'g-segments', role: 'group', 'aria-label': label });
    node.choose = (key) => Object.entries(buttons).forEach(([other, item]) => item.setAttribute('aria-pressed', String(other === String(key))));
    node.label = (key, text) => grpo.text(buttons[key], text);
    node.keys = Object.keys(options).join();
    for (const [key, text] of Object.entries(options)) {
      buttons[key] = h('button', { type: 'button', 'aria-pressed': 'false', onclick: () => { node.choose(key); onpick(key); } }, text);
      node.append(buttons[key]);
    }
    node.choose(chosen);
    return node;
  }

  const gainText = (value, places = 1) => (value === null ? '\u2013' : signed(Math.abs(value) < 0.5 * 10 ** -places ? 0 : value, places));

  grpo.gallery = Object.assign(grpo.gallery || {}, { name, arms, shot, scores, rewrite, interval, bar, segments, gainText, fixed });
})();
