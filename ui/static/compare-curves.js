/* One metric of several runs in one chart; a chart for each metric that was picked.

   const curves = grpo.compare.curves(host);
   curves.show(runs)      the runs to draw (rows of the table), each time they or their steps have changed */
'use strict';

(() => {
  const { h } = grpo;
  const MOST = 12;
  const LABEL = 13, FAR = 2 * LABEL;  // px between two labels at line ends, and from a line's end to its label at most
  grpo.compare = grpo.compare || {};

  const shownText = (text) => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');  // as charts_compare.py: plotly would take it for markup
  const short = (name, most) => (name.length > most ? `${name.slice(0, most - 1).trimEnd()}\u2026` : name);
  const room = (chart) => (chart.plot.clientWidth < 420 ? 9 : 16);  // letters of a label
  const lastOf = (trace) => {
    for (let i = trace.x.length - 1; i >= 0; i -= 1) if (trace.y[i] !== null && trace.y[i] !== undefined) return i;
    return -1;
  };

  /* The range of values that a person has zoomed to; null: all of them, as after a change of scale. */
  function zoomed({ plot, log }) {
    const { yaxis } = plot.layout || {};
    return yaxis && yaxis.autorange === false && (yaxis.type === 'log') === log ? yaxis.range : null;
  }

  /* The names of runs at the ends of their lines. Where they would touch they give way, upwards; who would come too
     far from its line goes without. */
  function endLabels(traces, { log, height, range, letters }) {
    const ends = traces.filter((trace) => trace.hoverinfo !== 'skip').map((trace) => ({ trace, at: lastOf(trace) })).filter(({ at }) => at >= 0)
      .map(({ trace, at }) => ({ trace, x: trace.x[at], y: trace.y[at] })).filter(({ y }) => !log || y > 0);
    if (!ends.length) return [];
    const scale = (y) => (log ? Math.log10(y) : y);
    let low = Infinity, high = -Infinity;
    if (range) [low, high] = range;
    else {
      for (const trace of traces) for (const y of trace.y) if (y !== null && y !== undefined && (!log || y > 0)) { low = Math.min(low, scale(y)); high = Math.max(high, scale(y)); }
    }
    const size = (high - low) || 1;
    for (const end of ends) end.place = (scale(end.y) - low) / size * height;
    let free = -Infinity;
    return ends.sort((a, b) => a.place - b.place).filter((end) => {
      const shift = Math.max(0, free - end.place);
      if (shift > FAR) return false;
      free = end.place + shift + LABEL;
      const moved = scale(end.y) + shift / height * size;
      if (shift) end.y = log ? 10 ** moved : moved;
      return true;
    }).map(({ trace, x, y }) => ({ type: 'scatter', uid: `${trace.meta.key} label`, mode: 'text', x: [x], y: [y], text: [` ${shownText(short(trace.meta.series, letters))}`], textposition: 'middle right',
      textfont: { color: trace.line.color, size: 11 }, cliponaxis: false, hoverinfo: 'skip', showlegend: false, meta: { label: true } }));
  }

  class Curves {
    constructor(host) {
      this.runs = [];
      this.metrics = [];  // of the server's list
      this.picked = [];
      this.axis = grpo.recall('compare.axis', 'step');
      this.weight = grpo.recall('compare.smooth', 0);
      this.charts = new Map();  // metric -> chart
      this.drawn = new Map();  // run -> {width, last}: what the charts have of it
      this.chain = Promise.resolve();
      this.turn = 0;  // rises when what the charts hold is thrown away
      this.pick = grpo.button('Metrics', () => this.pickMetrics(), { kind: 'small' });
      this.axes = h('span', { class: 'g-segments', role: 'group', 'aria-label': 'Horizontal axis' }, [['step', 'Steps', 'One unit is a training step'], ['minutes', 'Minutes', 'Time spent in training steps, without pauses and evaluations']]
        .map(([value, label, title]) => h('button', { type: 'button', title, data: { axis: value }, onclick: () => this.setAxis(value) }, label)));
      this.slider = h('input', { type: 'range', min: 0, max: 0.98, step: 0.02, 'aria-label': 'Smoothing', oninput: () => this.smooth(Number(this.slider.value)) });
      this.slider.value = String(this.weight);
      this.amount = h('span', { class: 'g-quiet g-small g-compare-amount' });
      this.csv = h('a', { class: 'g-button small', download: 'curves.csv', title: 'Every step of the chosen runs and metrics' }, 'CSV');
      this.bins = h('p', { class: 'g-quiet g-small' });
      this.grid = h('div', { class: 'g-grid g-compare-charts' });
      host.append(h('section', { class: 'g-stack', 'aria-label': 'Curves' },
        h('div', { class: 'g-row g-wide g-compare-bar' }, h('h2', {}, 'Curves'), this.bins, h('span', { class: 'g-row g-wide g-push' },
          h('label', { class: 'g-row' }, h('span', { class: 'g-quiet g-small' }, 'Smoothing'), this.slider, this.amount), this.axes, this.pick, this.csv)),
        this.grid));
      this.press();
      this.known = grpo.get('compare/metrics').catch(() => null);  // at once, beside the table
    }

    press() {
      for (const button of this.axes.children) button.setAttribute('aria-pressed', String(button.dataset.axis === this.axis));
      grpo.text(this.amount, this.weight ? this.weight.toFixed(2) : 'off');
      this.csv.href = `/grpo/compare/curves.csv?${new URLSearchParams({ runs: this.runs.map((run) => run.id).join(','), metrics: this.picked.join(',') })}`;
    }

    show(runs) {
      this.runs = runs;
      this.press();
      return this.enqueue(() => this.sync());
    }

    /* One talk with the server at a time; what a later change made pointless is left out. */
    enqueue(job) {
      const turn = this.turn;
      this.chain = this.chain.then(() => (turn === this.turn ? job() : undefined));
      const mine = this.chain;
      this.chain = mine.catch(() => undefined);
      return mine;
    }

    async sync() {
      if (!this.metrics.length) {
        this.metrics = (await this.known || await grpo.get('compare/metrics')).metrics;
        const wanted = new Set(grpo.recall('compare.metrics', []));
        const before = this.metrics.filter(({ name }) => wanted.has(name));
        this.picked = (before.length ? before : this.metrics.filter((metric) => metric.default)).map(({ name }) => name);
      }
      this.place();
      const ids = new Set(this.runs.map(({ id }) => id));
      for (const id of this.drawn.keys()) if (!ids.has(id)) this.drop(id);
      const turn = this.turn;
      for (const metric of [...this.picked]) {  // one by one: the first chart stands while the next is asked for
        const chart = this.charts.get(metric);
        const missing = this.runs.filter(({ id }) => !chart.has.has(id));
        if (!missing.length) continue;
        const told = await this.ask(missing, [metric]);
        if (turn !== this.turn) return;
        this.addTo(chart, metric, told);
      }
      const moved = this.runs.filter((run) => this.drawn.has(run.id) && this.drawn.get(run.id).last !== run.step);
      if (moved.length && this.picked.length) {
        const have = moved.map(({ id }) => `${id}:${this.drawn.get(id).width}:${this.drawn.get(id).last}`).join(',');
        const told = await this.ask(moved, this.picked, have);
        if (turn === this.turn) this.extend(told);
      }
      this.rename();
      this.tell();
    }

    ask(runs, metrics, have = null) {
      return grpo.get('compare/curves', { runs: runs.map(({ id }) => id).join(','), metrics: metrics.join(','), axis: this.axis, have });
    }

    /* A figure for every picked metric, in the list's order; their places are there before their data. */
    place() {
      for (const [metric, chart] of this.charts) {
        if (!this.picked.includes(metric)) {
          chart.destroy();
          this.charts.delete(metric);
        }
      }
      for (const { name, title, unit, meaning } of this.metrics) {
        if (!this.picked.includes(name)) continue;
        if (!this.charts.has(name)) {
          const chart = grpo.chart(this.grid, { name, title, unit, note: meaning, height: 260 });
          chart.has = new Set();
          chart.weight = this.weight;
          const plain = chart.traces.bind(chart);
          chart.traces = () => {
            const traces = plain();
            return [...traces, ...endLabels(traces, { log: chart.log, height: Math.max(80, chart.plot.clientHeight - 60), range: zoomed(chart), letters: room(chart) })];
          };
          this.charts.set(name, chart);
        }
        const { node } = this.charts.get(name);
        const next = this.grid.children[this.picked.indexOf(name)];
        if (next !== node && node.nextSibling !== next) this.grid.insertBefore(node, next || null);
      }
      grpo.text(this.pick, `Metrics (${this.picked.length})`);
      this.press();
    }

    addTo(chart, metric, told) {
      const fresh = told.figures[metric];
      const figure = chart.raw || { data: [], layout: {} };
      const order = new Map(this.runs.map(({ id }, index) => [id, index]));
      figure.data = [...figure.data, ...fresh.data].sort((a, b) => order.get(a.meta.run) - order.get(b.meta.run));
      figure.layout = { ...fresh.layout, hovermode: figure.data.length > 8 ? 'closest' : 'x unified', margin: { r: 14 + 5.8 * Math.max(...figure.data.map((trace) => short(trace.meta.series, room(chart)).length)) } };
      for (const trace of fresh.data) chart.has.add(trace.meta.run);
      for (const [id, state] of Object.entries(told.state)) {
        const known = this.drawn.get(id);
        if (!known || state.last < known.last) this.drawn.set(id, state);
      }
      chart.figure(figure);
    }

    extend(told) {
      for (const [metric, points] of Object.entries(told.points)) {
        const chart = this.charts.get(metric);
        if (!chart || !chart.raw) continue;
        for (const trace of chart.raw.data) {
          if (told.anew.includes(trace.meta.run)) Object.assign(trace, { x: [], y: [] });
        }
        chart.extend(points);
      }
      for (const [id, state] of Object.entries(told.state)) this.drawn.set(id, state);
    }

    drop(id) {
      this.drawn.delete(id);
      for (const chart of this.charts.values()) {
        if (!chart.has.delete(id)) continue;
        chart.raw.data = chart.raw.data.filter((trace) => trace.meta.run !== id);
        chart.draw();
      }
    }

    rename() {
      for (const chart of this.charts.values()) {
        let changed = false;
        for (const trace of chart.raw ? chart.raw.data : []) {
          const run = this.runs.find(({ id }) => id === trace.meta.run);
          if (run && run.name !== trace.meta.series) {
            trace.meta.series = run.name;
            trace.name = shownText(run.name);
            changed = true;
          }
        }
        if (changed) chart.draw();
      }
    }

    tell() {
      const widths = this.runs.map(({ id }) => (this.drawn.get(id) || { width: 1 }).width);
      const widest = Math.max(1, ...widths);
      grpo.text(this.bins, widest > 1 ? `Each point is the mean of up to ${widest} steps, drawn at the first of them.` : '');
    }

    setAxis(axis) {
      if (axis === this.axis) return;
      this.axis = axis;
      grpo.remember('compare.axis', axis);
      this.press();
      this.turn += 1;
      this.drawn.clear();
      for (const chart of this.charts.values()) chart.destroy();  // on another axis a zoom means nothing
      this.charts.clear();
      grpo.attempt(null, () => this.enqueue(() => this.sync()));
    }

    smooth(weight) {
      this.weight = weight;
      grpo.remember('compare.smooth', weight);
      this.press();
      for (const chart of this.charts.values()) if (chart.raw) chart.smooth(weight); else chart.weight = weight;
    }

    pickMetrics() {
      const list = h('div', { class: 'g-compare-metrics' }, this.metrics.map(({ name, title, unit, meaning }) => {
        const box = h('input', { type: 'checkbox', checked: this.picked.includes(name) });
        box.addEventListener('change', () => {
          const wanted = new Set(this.picked);
          if (box.checked) wanted.add(name);
          else wanted.delete(name);
          if (wanted.size > MOST || !wanted.size) {
            box.checked = !box.checked;
            grpo.toast(wanted.size ? `At most ${MOST} charts at once.` : 'Keep at least one chart.');
            return;
          }
          this.picked = this.metrics.map((metric) => metric.name).filter((metric) => wanted.has(metric));
          grpo.remember('compare.metrics', this.picked);
          grpo.attempt(null, () => this.enqueue(() => this.sync()));
        });
        return h('label', { class: 'g-compare-metric' }, box, h('span', {}, h('span', { class: 'g-strong' }, title), unit ? h('span', { class: 'g-faint g-small' }, ` ${unit}`) : null,
          h('span', { class: 'g-quiet g-small g-compare-meaning' }, meaning)));
      }));
      return grpo.dialog('Metrics to draw', list, [{ label: 'Done', value: true, kind: 'primary' }]).closed;
    }
  }

  grpo.compare.curves = (host) => new Curves(host);
})();
