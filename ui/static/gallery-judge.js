/* The judge beside CLIP: a point a prompt, and how far the two agree. A click on a point opens its prompt. */
'use strict';

(() => {
  const { h, fill } = grpo;
  const gallery = grpo.gallery = grpo.gallery || {};
  const KINDS = [['both_rose', 'both rose'], ['only_clip', 'only CLIP rose, the judge fell'], ['only_judge', 'only the judge rose, CLIP fell'], ['both_fell', 'both fell'], ['unmoved', 'one or both stayed the same']];
  let parts = null, key = '';

  gallery.judge = {
    async show(now, host) {
      if (!parts) {
        parts = { chart: h('div', {}), said: h('div', { class: 'g-card g-stack' }), now };
        host.append(h('div', { class: 'g-gallery-two' }, parts.chart, parts.said));
        parts.plot = grpo.chart(parts.chart, { name: 'judge-beside-clip', title: 'Gain of each prompt', note: 'CLIP is what training raises; the judge is a second measure that it never sees. Click a point to open its prompt.', height: 460 });
        parts.plot.onStep = (x, meta, point) => {
          if (point) gallery.open(parts.now, { prompt: point.customdata }).catch((error) => grpo.toast(error.message, 'error'));
        };
      }
      parts.now = now;
      const fresh = JSON.stringify([now.overview.ids, now.compare]);
      parts.asked = fresh;
      if (fresh === key) return;
      const found = await grpo.get('gallery/agreement', { run: now.run, at: now.overview.at, compare: now.compare });
      if (parts.asked !== fresh) return;  // something else is wanted by now
      key = fresh;
      parts.chart.hidden = found.n === 0;
      fill(parts.said, h('h2', {}, 'Do they agree?'), h('p', {}, found.sentence),
        found.n ? h('table', { class: 'g-table' }, h('tbody', {}, KINDS.map(([name, label]) => h('tr', {}, h('td', {}, label), h('td', { class: 'g-number' }, found.counts[name].toLocaleString())))))
          : h('p', { class: 'g-quiet' }, 'Choose a judge in the settings of the next run (evaluation.judge) to have its pictures scored a second way.'),
        found.n > found.most ? h('p', { class: 'g-small g-quiet' }, `The chart draws at most ${found.most.toLocaleString()} of the ${found.n.toLocaleString()} prompts, evenly picked; the numbers are of all.`) : null);
      if (found.n) await parts.plot.figure(found.figure);
    },
  };
})();
