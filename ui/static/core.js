/* What every screen builds on; shell.js adds screens, addresses and the pulse.

   grpo.get(path, params), grpo.post(path, body)    talk to /grpo/...; throw Error(sentence) with .field, .status
   grpo.attempt(button, action)  run an async action of a button: busy while it lasts, a toast when it fails
   grpo.h(tag, attributes, ...children)   an element; text is always text, never markup
   grpo.toast(text, kind), grpo.confirm(question, verb), grpo.dialog(title, content)
   grpo.num, .signed, .percent, .duration, .ago, .date, .shortDate, .bytes     numbers as people read them
   grpo.diff(from, to, unread, count), .read(to, unread, count), .readUpTo(count)   a text, its changes and unread end marked
   grpo.picture(path, alt), grpo.state(state), grpo.color(number), grpo.empty(title, text, ...)
*/
'use strict';

const grpo = (() => {
  const COLORS = 8;  // --g-c1 to --g-c8 in style.css

  // -- elements ---------------------------------------------------------------------------------------

  const SVG = new Set(['svg', 'path', 'circle', 'line', 'rect', 'g', 'polyline']);

  function h(tag, attributes = {}, ...children) {
    const node = SVG.has(tag) ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
      else if (name === 'class') node.setAttribute('class', Array.isArray(value) ? value.filter(Boolean).join(' ') : value);
      else if (name === 'style' && typeof value === 'object') {
        for (const [key, item] of Object.entries(value)) node.style.setProperty(key, item);
      } else if (name === 'data') Object.assign(node.dataset, value);
      else if (['value', 'checked', 'disabled', 'selected', 'indeterminate'].includes(name)) node[name] = value;
      else node.setAttribute(name, value === true ? '' : value);
    }
    add(node, children);
    return node;
  }

  function add(node, children) {
    for (const child of children.flat(Infinity)) {
      if (child === undefined || child === null || child === false) continue;
      node.append(child instanceof Node ? child : String(child));
    }
  }

  /* Replace a node's children; nothing happens when what would be shown is what is shown (no flicker, focus stays). */
  function fill(node, ...children) {
    const fresh = node.cloneNode(false);
    add(fresh, children);
    if (fresh.isEqualNode(node) && !fresh.querySelector('button, a, input, select')) return node;
    node.replaceChildren(...fresh.childNodes);
    return node;
  }

  function text(node, value) {
    if (node.textContent !== value) node.textContent = value;
  }

  // -- numbers ----------------------------------------------------------------------------------------

  const DASH = '\u2013';
  const missing = (x) => x === null || x === undefined || Number.isNaN(x);

  function num(x, digits = 3) {
    if (missing(x)) return DASH;
    const size = Math.abs(x);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return x.toExponential(Math.max(digits - 1, 0)).replace('e+', 'e').replace('-', '\u2212');
    const places = size === 0 ? 0 : Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
    return x.toFixed(Math.min(places, 6)).replace('-', '\u2212');
  }

  const signed = (x, places = 2) => (missing(x) ? DASH : (x > 0 ? '+' : '') + x.toFixed(places).replace('-', '\u2212'));
  const percent = (x, places = 0) => (missing(x) ? DASH : `${(100 * x).toFixed(places).replace('-', '\u2212')} %`);

  function duration(seconds) {
    if (missing(seconds)) return DASH;
    const s = Math.max(0, Math.round(seconds));
    if (seconds < 10) return `${seconds.toFixed(1)} s`;
    if (s < 60) return `${s} s`;
    if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, '0')} s`;
    if (s < 86400) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, '0')} min`;
    return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
  }

  function ago(time) {
    if (missing(time)) return DASH;
    const s = Date.now() / 1000 - time;
    return s < 2 ? 'just now' : `${duration(s).replace(/\.\d s/, ' s')} ago`;
  }

  function date(time) {
    if (missing(time)) return DASH;
    return new Date(time * 1000).toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' });
  }

  /* For a narrow column: the year only where it is another. */
  function shortDate(time) {
    if (missing(time)) return DASH;
    const then = new Date(time * 1000);
    const year = then.getFullYear() === new Date().getFullYear() ? undefined : 'numeric';
    return then.toLocaleString(undefined, { month: 'short', day: 'numeric', year, hour: 'numeric', minute: '2-digit' });
  }

  function bytes(n) {
    if (missing(n)) return DASH;
    const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
    let unit = 0;
    for (; n >= 1024 && unit < units.length - 1; unit += 1) n /= 1024;
    return `${n.toFixed(unit && n < 100 ? 1 : 0)} ${units[unit]}`;
  }

  // -- talking to the server --------------------------------------------------------------------------

  class Failure extends Error {
    constructor(sentence, field, status) {
      super(sentence);
      this.field = field || '';
      this.status = status;
    }
  }

  async function ask(path, options) {
    let response;
    try {
      response = await fetch(path, options);
    } catch {
      throw new Failure('The app does not answer; is it still running?', '', 0);
    }
    if (!response.ok) {
      let told = {};
      try {
        told = await response.json();
      } catch { /* no JSON: a proxy's page, perhaps */ }
      throw new Failure(told.error || `The app answered with an error (${response.status}).`, told.field, response.status);
    }
    return response.json();
  }

  function get(path, params = {}, options = {}) {
    const query = new URLSearchParams();
    for (const [key, value] of Object.entries(params)) if (!missing(value)) query.set(key, value);
    const tail = query.toString();
    return ask(`/grpo/${path}${tail ? `?${tail}` : ''}`, options);
  }

  const post = (path, body = {}) => ask(`/grpo/${path}`, {
    method: 'POST', headers: { 'Content-Type': 'application/json', 'X-GRPO': '1' }, body: JSON.stringify(body),
  });

  const send = (path, file) => ask(`/grpo/${path}`, {
    method: 'POST', headers: { 'Content-Type': 'application/octet-stream', 'X-GRPO': '1', 'X-Name': encodeURIComponent(file.name) }, body: file,
  });

  async function attempt(button, action) {
    if (button && button.getAttribute('aria-busy') === 'true') return undefined;
    if (button) button.setAttribute('aria-busy', 'true');
    try {
      return await action();
    } catch (error) {
      if (!(error instanceof Failure)) console.warn(error);
      toast(error.message, 'error');
      return undefined;
    } finally {
      if (button) button.removeAttribute('aria-busy');
      grpo.refresh();
    }
  }

  // -- pieces -----------------------------------------------------------------------------------------

  function toast(message, kind = 'info') {
    let stack = document.getElementById('g-toasts');
    if (!stack) {
      stack = h('div', { id: 'g-toasts', role: 'status', 'aria-live': 'polite' });
      document.body.append(stack);
    }
    const close = () => node.remove();
    const node = h('div', { class: `g-toast g-${kind}` }, h('span', {}, message),
      h('button', { class: 'g-icon', 'aria-label': 'Dismiss', onclick: close }, icon('close')));
    stack.append(node);
    while (stack.children.length > 4) stack.firstChild.remove();
    setTimeout(close, kind === 'error' ? 12000 : 5000);
  }

  /* A modal dialog; returns {node, close, closed}, `closed` resolves with what close() was given. */
  function dialog(title, content, buttons = []) {
    let settle;
    const closed = new Promise((resolve) => { settle = resolve; });
    const node = h('dialog', { class: 'g-dialog', 'aria-label': title });
    const close = (value) => {
      node.close();
      node.remove();
      settle(value);
    };
    add(node, [
      h('header', {}, h('h2', {}, title), h('button', { class: 'g-icon', 'aria-label': 'Close', onclick: () => close() }, icon('close'))),
      h('div', { class: 'g-body' }, content),
      buttons.length ? h('footer', {}, buttons.map((b) => h('button', { class: ['g-button', b.kind], onclick: () => close(b.value) }, b.label))) : null,
    ]);
    node.addEventListener('cancel', (event) => { event.preventDefault(); close(); });
    node.addEventListener('click', (event) => { if (event.target === node) close(); });
    page().append(node);
    node.showModal();
    return { node, close, closed };
  }

  async function confirm(question, verb, kind = 'primary') {
    return Boolean(await dialog(verb, h('p', {}, question), [
      { label: 'Cancel', value: false, kind: '' }, { label: verb, value: true, kind },
    ]).closed);
  }

  const page = () => document.querySelector('.gradio-container') || document.body;

  const ICONS = {
    close: 'M4 4l8 8M12 4l-8 8', check: 'M3 8.5l3.5 3.5L13 4.5', play: 'M5 3l8 5-8 5z', pause: 'M5 3v10M11 3v10', stop: 'M4 4h8v8H4z',
    save: 'M8 2v8M4.5 7L8 10.5 11.5 7M3 13h10', expand: 'M9.5 2.5h4v4M6.5 13.5h-4v-4M13.5 2.5l-5 5M2.5 13.5l5-5', more: 'M3 8h.01M8 8h.01M13 8h.01',
    up: 'M4 10l4-4 4 4', down: 'M4 6l4 4 4-4', left: 'M10 4L6 8l4 4', right: 'M6 4l4 4-4 4', copy: 'M5 5V2.5h8.500V11H11M2.5 5H11v8.500H2.500z',
    search: 'M7 12A5 5 0 107 2a5 5 0 000 10zM10.5 10.500L14 14', edit: 'M3 13l1-3.500L11 2.5 13.5 5 6.5 12z', trash: 'M3 4.500h10M6 4.500V2.500h4v2M4.5 4.500l.5 9h6l.5-9',
    upload: 'M8 11V3M4.5 6L8 2.5 11.5 6M3 13.500h10', sun: 'M8 5a3 3 0 100 6 3 3 0 000-6zM8 1.500v1M8 13.500v1M1.5 8h1M13.5 8h1M3.4 3.400l.7.700M11.9 11.900l.7.700M3.4 12.600l.7-.700M11.9 4.100l.7-.7',
    moon: 'M13 9.500A5.5 5.5 0 116.5 3 4.5 4.5 0 0013 9.500z', help: 'M6 6a2 2 0 113 1.700c-.7.4-1 .8-1 1.600M8 11.800v.1', plus: 'M8 3v10M3 8h10', log: 'M3 13V3M3 13h10M5 11c4 0 2-6 8-7',
  };

  function icon(name) {
    return h('svg', { viewBox: '0 0 16 16', class: 'g-svg', 'aria-hidden': 'true' }, h('path', { d: ICONS[name] }));
  }

  const STATES = {
    queued: 'waiting', loading: 'busy', baseline: 'busy', training: 'busy', evaluating: 'busy', paused: 'waiting',
    finished: 'good', stopped: 'idle', interrupted: 'warn', failed: 'bad',
  };

  const state = (name, label) => h('span', { class: `g-state g-${STATES[name] || 'idle'}` }, label || name);

  function picture(path, alt, attributes = {}) {
    if (!path) return h('div', { class: 'g-picture g-none', role: 'img', 'aria-label': 'no picture' }, 'no picture');
    return h('img', { class: 'g-picture', src: `/grpo/pictures/${path}`, alt, loading: 'lazy', decoding: 'async', draggable: 'false', ...attributes });
  }

  const words = (line) => line.split(/\s+/).filter(Boolean);
  const plain = (word) => word.toLowerCase().replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, '');

  /* What is said of a text whose last tokens are cut off before it is drawn. */
  const readUpTo = (count) => `The image model does not read its last ${count} token${count === 1 ? '' : 's'}.`;

  /* A text without a mark at what changed: only its end that the image model does not read is marked. */
  const read = (to, unread, count) => h('span', { class: 'g-diff' }, unread ? [to.slice(0, to.length - unread.length), lost(unread, count)] : to);
  const lost = (text, count) => h('span', { class: 'g-unread', title: readUpTo(count) }, text);

  /* Word-level difference (longest common subsequence): kept words plain, new ones marked, lost ones struck. `unread` is
     the end of `to`, of `count` tokens, that the image model does not read: it may begin inside a word. */
  function diff(from, to, unread = '', count = 0) {
    const a = words(from || ''), b = words(to || ''), tail = words(unread || '');
    if (a.length * b.length > 250000) return read(to, unread, count);
    const said = (place) => {
      const beyond = place - (b.length - tail.length), word = b[place];
      return beyond < 0 ? word : beyond > 0 ? lost(word, count) : [word.slice(0, word.length - tail[0].length), lost(tail[0], count)];
    };
    const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i -= 1) {
      for (let j = b.length - 1; j >= 0; j -= 1) {
        table[i][j] = plain(a[i]) === plain(b[j]) ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
      }
    }
    const out = h('span', { class: 'g-diff' });
    let i = 0, j = 0;
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && plain(a[i]) === plain(b[j])) {
        out.append(...[said(j)].flat(), ' ');
        i += 1;
        j += 1;
      } else if (j < b.length && (i === a.length || table[i][j + 1] >= table[i + 1][j])) {
        out.append(h('ins', {}, said(j)), ' ');
        j += 1;
      } else {
        out.append(h('del', {}, a[i]), ' ');
        i += 1;
      }
    }
    return out;
  }

  /* The colour of run `number`, in either theme, as a style's value. */
  const color = (number) => `var(--g-c${((number - 1 + COLORS) % COLORS) + 1})`;

  const empty = (title, message, ...actions) => h('div', { class: 'g-empty' }, h('h3', {}, title), h('p', {}, message),
    actions.length ? h('div', { class: 'g-row' }, actions) : null);

  const button = (label, action, { kind = '', title, glyph } = {}) => {
    const node = h('button', { type: 'button', class: ['g-button', kind], title }, glyph ? icon(glyph) : null, label);
    node.addEventListener('click', () => attempt(node, () => action(node)));
    return node;
  };

  async function copy(value, what) {
    try {
      await navigator.clipboard.writeText(value);
      toast(`${what} copied.`);
    } catch {  // no permission, or not a secure address
      dialog(what, h('textarea', { class: 'g-input g-mono', rows: 6, readonly: true }, value)).node.querySelector('textarea').select();
    }
  }

  const remember = (key, value) => { try { localStorage.setItem(`grpo.${key}`, JSON.stringify(value)); } catch { /* private window */ } };
  const recall = (key, otherwise) => {
    try {
      const found = localStorage.getItem(`grpo.${key}`);
      return found === null ? otherwise : JSON.parse(found);
    } catch { return otherwise; }
  };

  const dark = () => document.body.classList.contains('dark');

  return {
    get, post, send, attempt, h, add, fill, text, num, signed, percent, duration, ago, date, shortDate, bytes,
    toast, dialog, confirm, picture, diff, read, readUpTo, state, color, empty, button, icon, copy, remember, recall, dark, page, missing, Failure,
  };
})();
