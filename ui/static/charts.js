/* Charts that keep what a person did to them.

   const chart = grpo.chart(host, {name, title, note, unit, height});
   chart.figure(fig)        a plotly figure from charts.py; later calls keep zoom, hover and legend choices
   chart.extend(columns)    new points: {key: {x: [...], y: [...]}} for traces whose meta.key is `key`;
                            points from the first new x on are replaced, so a bin that was still filling is mended
   chart.smooth(weight)     0..0.99: exponential smoothing of the traces with meta.smooth
   chart.mark(step)         a line at a step; null: none
   chart.destroy()          take it off the page for good
   chart.onStep = (step, meta, point) => ...    a point was clicked; `point` is plotly's

   Each chart has its own: log scale, full screen, PNG, CSV. plotly.js is loaded when the first chart needs it; where
   that fails, the chart says so in the figure's place. */
'use strict';

(() => {
  let library = null;

  function plotly() {
    library = library || new Promise((resolve, reject) => {
      const script = document.createElement('script');
      script.src = '/grpo/static/plotly.min.js';
      script.onload = () => resolve(window.Plotly);
      script.onerror = () => { library = null; script.remove(); reject(new Error('The chart library could not be loaded; reload the page.')); };
      document.head.append(script);
    });
    return library;
  }

  /* Charts are drawn one after another, and the page breathes between them: the first stands before the last is begun. */
  let last = Promise.resolve();
  function turn() {
    const mine = last;
    last = mine.then(() => new Promise((resolve) => { setTimeout(resolve, 0); }));
    return mine;
  }

  const css = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();

  /* The server draws with the light theme's colours (PALETTE in charts.py); in the dark they are exchanged. */
  const PALETTE = ['#0072b2', '#d55e00', '#009e73', '#8f2d5f', '#3a9bdc', '#7a5c00', '#4b2a87', '#6b6b6b'];
  const rgb = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16)).join(',');

  function themed(color) {
    if (!grpo.dark() || typeof color !== 'string') return color;
    const solid = PALETTE.indexOf(color);
    if (solid >= 0) return css(`--g-c${solid + 1}`);
    const fill = PALETTE.findIndex((hex) => color.startsWith(`rgba(${rgb(hex)},`));
    return fill < 0 ? color : color.replace(rgb(PALETTE[fill]), rgb(css(`--g-c${fill + 1}`)));
  }

  const recolored = (trace) => ({ ...trace, fillcolor: themed(trace.fillcolor),
    ...(trace.line ? { line: { ...trace.line, color: themed(trace.line.color) } } : {}),
    ...(trace.marker ? { marker: { ...trace.marker, color: themed(trace.marker.color) } } : {}) });
  const CONFIG = { displaylogo: false, displayModeBar: false, responsive: false, doubleClick: 'reset', scrollZoom: false };

  /* Exponential moving average with bias correction, so that the first points are not pulled to 0. */
  function smoothed(values, weight) {
    let sum = 0, mass = 0;
    return values.map((value) => {
      if (value === null || value === undefined) return value;
      sum = weight * sum + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      return sum / mass;
    });
  }

  /* A cell of a CSV; text that a spreadsheet would run as a formula gets an apostrophe before it, as in compare.py. */
  function cell(value) {
    const text = typeof value === 'string' && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  }

  class Chart {
    constructor(host, { name, title, note = '', unit = '', height = 240 }) {
      const { h, icon } = grpo;
      this.name = name;
      this.unit = unit;
      this.onStep = null;
      this.raw = null;  // the figure as the server and extend() made it
      this.weight = 0;
      this.step = null;
      this.log = false;
      this.plot = h('div', { class: 'g-plot', style: { height: `${height}px` } });
      const tool = (label, glyph, action) => h('button', { type: 'button', class: 'g-icon', title: label, 'aria-label': `${title}: ${label}`, onclick: action }, typeof glyph === 'string' ? icon(glyph) : glyph);
      this.logButton = tool('Log scale', 'log', () => this.toggleLog());
      this.logButton.setAttribute('aria-pressed', 'false');
      this.node = h('figure', { class: 'g-chart', 'aria-label': title, data: { chart: name } },
        h('figcaption', {}, h('span', { class: 'g-title' }, title, unit ? h('span', { class: 'g-unit' }, unit) : null),
          h('span', { class: 'g-tools' }, this.logButton,
            tool('PNG', h('span', {}, 'PNG'), () => grpo.attempt(null, () => this.png())), tool('CSV', h('span', {}, 'CSV'), () => this.csv()),
            tool('Full screen', 'expand', () => this.full()))),
        note ? h('p', { class: 'g-note' }, note) : null, this.plot);
      host.append(this.node);
      this.end = new AbortController();
      this.sizes = new ResizeObserver(() => this.resize());
      this.sizes.observe(this.plot);
      document.addEventListener('grpo-theme', () => this.draw(), { signal: this.end.signal });
      document.addEventListener('fullscreenchange', () => this.resize(), { signal: this.end.signal });
    }

    destroy() {
      this.end.abort();
      this.sizes.disconnect();
      this.node.remove();
      if (this.drawn()) window.Plotly.purge(this.plot);
      this.raw = null;  // nothing to draw, should a drawing be on its way
    }

    drawn() {
      return this.plot.classList.contains('js-plotly-plot');
    }

    figure(fig) {
      this.raw = fig;
      return this.draw();
    }

    extend(columns) {
      if (!this.raw) return undefined;
      for (const trace of this.raw.data) {
        const fresh = trace.meta && columns[trace.meta.key];
        if (!fresh || !fresh.x.length) continue;
        let keep = trace.x.length;
        while (keep && trace.x[keep - 1] >= fresh.x[0]) keep -= 1;
        trace.x = trace.x.slice(0, keep).concat(fresh.x);
        trace.y = trace.y.slice(0, keep).concat(fresh.y);
      }
      return this.draw();
    }

    smooth(weight) {
      this.weight = weight;
      return this.draw();
    }

    mark(step) {
      this.step = step;
      return this.draw();
    }

    toggleLog() {
      this.log = !this.log;
      this.logButton.setAttribute('aria-pressed', String(this.log));
      return this.draw();
    }

    /* Each trace has an identity, so that what was hidden in the legend stays hidden when others come or go. */
    traces() {
      const hidden = (key) => (this.plot.data || []).some((trace) => trace.uid === key && trace.visible === 'legendonly');
      const some = this.raw.data.some(({ x }) => x.length);  // beside them an axis without any point would be drawn at NaN
      return this.raw.data.map(recolored).flatMap((trace, index) => {
        if (some && !trace.x.length) return [];
        const uid = (trace.meta && trace.meta.key) || String(index);
        if (!this.weight || !trace.meta || !trace.meta.smooth) return [{ ...trace, uid }];
        const group = trace.legendgroup || uid;
        const faint = { ...trace, uid: `${uid} raw`, legendgroup: group, opacity: grpo.dark() ? 0.45 : 0.3, showlegend: false, hoverinfo: 'skip', hovertemplate: null,
          name: `${trace.name} raw`, line: { ...trace.line, width: 1 }, ...(hidden(uid) ? { visible: 'legendonly' } : {}) };
        const [tip, extra] = (trace.hovertemplate || '%{y:.4~g}').split('<extra>');  // the pointer is told both: what was measured, and the trend
        const hovertemplate = `${tip.replace(/%\{y/g, '%{customdata')}, smoothed ${tip}${extra === undefined ? '' : `<extra>${extra}`}`;
        return [faint, { ...trace, uid, legendgroup: group, customdata: trace.y, hovertemplate, y: smoothed(trace.y, this.weight) }];
      });
    }

    layout() {
      const grid = css('--g-grid'), ink = css('--g-ink'), quiet = css('--g-quiet'), surface = css('--g-surface');
      const base = this.raw.layout || {};
      // Labels without room are kept: with all of an axis hidden, plotly would place its title at infinity.
      const axis = (mine) => ({ gridcolor: grid, zerolinecolor: grid, linecolor: grid, tickfont: { color: quiet, size: 11 }, automargin: true, ticklabeloverflow: 'allow', ...mine,
        title: mine && mine.title ? { ...(mine.title.text ? mine.title : { text: mine.title }), font: { color: quiet, size: 11 }, standoff: 6 } : undefined });
      const layout = { ...base, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', template: undefined, font: { family: 'system-ui, sans-serif', color: ink, size: 12 },
        margin: { l: 8, r: 12, t: 6, b: 8, ...base.margin }, uirevision: base.uirevision || 'kept', hovermode: base.hovermode || 'x unified', dragmode: 'zoom',
        hoverlabel: { bgcolor: surface, bordercolor: grid, font: { color: ink, size: 12 } }, legend: { orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom', font: { size: 11, color: quiet }, ...base.legend },
        xaxis: axis(base.xaxis), yaxis: axis(base.yaxis), shapes: [...(base.shapes || [])],
        annotations: (base.annotations || []).map((a) => ({ ...a, font: { size: 11, color: quiet, ...a.font } })) };
      if (base.yaxis2) layout.yaxis2 = axis(base.yaxis2);
      if (this.log) layout.yaxis = { ...layout.yaxis, type: 'log' };
      layout.yaxis.uirevision = `${layout.uirevision} ${this.log ? 'log' : 'linear'}`;  // a zoom means something else on the other scale
      if (this.step !== null) {
        layout.shapes.push({ type: 'line', x0: this.step, x1: this.step, yref: 'paper', y0: 0, y1: 1, line: { color: css('--g-accent'), width: 1, dash: 'dot' } });
      }
      return layout;
    }

    /* One redraw a frame at most; none while the chart is off screen (resize() draws it when it comes back). Without
       the library there is none, and nobody needs to wait to hear of it; the next call tries again. */
    draw() {
      if (this.drawing) return this.drawing;
      this.drawing = (async () => {
        const lib = await plotly().catch((error) => this.tell(error.message));
        if (!lib) {
          this.drawing = null;
          return;
        }
        await new Promise((resolve) => { requestAnimationFrame(resolve); setTimeout(resolve, 100); });
        await turn();
        this.drawing = null;
        this.stale = true;
        if (!this.raw || !this.plot.clientWidth) return;
        this.stale = false;
        const first = !this.drawn();
        if (first) this.plot.replaceChildren();  // what tell() said
        this.width = this.plot.clientWidth;
        this.height = this.plot.clientHeight;
        await lib.react(this.plot, this.traces(), { ...this.layout(), width: this.width, height: this.height }, CONFIG);
        if (first) {
          this.plot.on('plotly_click', ({ points }) => {
            const point = points[0];
            if (this.onStep && point) this.onStep(Number(point.x), point.data.meta || {}, point);
          });
        }
      })();
      return this.drawing;
    }

    tell(sentence) {
      grpo.fill(this.plot, grpo.h('div', { class: 'g-empty', role: 'status' }, grpo.h('p', {}, sentence)));
    }

    resize() {
      if (!this.plot.clientWidth) return;
      if (this.stale || this.plot.clientWidth !== this.width || this.plot.clientHeight !== this.height) this.draw();
    }

    full() {
      if (document.fullscreenElement) document.exitFullscreen();
      else this.node.requestFullscreen().catch(() => grpo.toast('This browser does not allow full screen here.', 'error'));
    }

    async png() {
      if (!this.raw) return;
      const lib = await plotly();
      const background = css('--g-surface');
      const copy = document.createElement('div');
      await lib.newPlot(copy, this.traces(), { ...this.layout(), paper_bgcolor: background, title: { text: this.name }, width: 1200, height: 600, margin: { l: 60, r: Math.max(30, this.layout().margin.r), t: 60, b: 50 } }, CONFIG);
      await lib.downloadImage(copy, { format: 'png', width: 1200, height: 600, scale: 2, filename: this.name });
      lib.purge(copy);
    }

    csv() {
      if (!this.raw) return;
      const lines = ['series,x,y'];
      for (const trace of this.raw.data) {
        (trace.x || []).forEach((x, index) => lines.push([(trace.meta && trace.meta.series) || trace.name || '', x, trace.y[index] ?? ''].map(cell).join(',')));
      }
      const link = document.createElement('a');
      link.href = URL.createObjectURL(new Blob([lines.join('\n') + '\n'], { type: 'text/csv' }));
      link.download = `${this.name}.csv`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }
  }

  grpo.chart = (host, options) => new Chart(host, options);
  grpo.chart.load = plotly;  // for a screen that will need a chart as soon as its data is there
})();
