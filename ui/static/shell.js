/* Screens, addresses, and the pulse that keeps them true.

   grpo.screen(name, {mount(root), show(args), hide(), change(pulse)})   register a screen:
       mount  once, fills `root`;  show  each time it comes on screen or the address changes (args: from the hash);
       hide   when it leaves the screen;  change  while it is on screen, when the database or the worker changed
   grpo.go(screen, args)        go to a screen; the address (#live?run=...) is what a reload or a link restores
   grpo.note(screen, args)      note what is on screen in the address
   grpo.pulse, grpo.onPulse(listener), grpo.refresh()     the database's revision, active runs, the worker's state */
'use strict';

(() => {
  const { Failure, fill, get, h, icon, missing, recall, remember, state, toast, dark } = grpo;
  const screens = {};
  const mounted = {};
  const PULSE = 1000;  // ms between looks at the database's revision
  const HUNG = 10_000;  // ms after which a look counts as lost: an app that hangs would hold up all later ones
  let shown = null;
  let restoring = true;  // until the screen that the address names is open
  let pulse = { revision: -1, active: [], worker: { engine: 'loading', imported: 0, imports: 1, queue: [] } };
  let lost = 0;
  const listeners = [];

  // -- the pulse --------------------------------------------------------------------------------------

  let beating = null;

  async function refresh() {
    if (beating) return beating;
    beating = (async () => {
      try {
        const fresh = await get('pulse', {}, { signal: AbortSignal.timeout(HUNG) });
        const missed = lost > 0;  // what the screen asked for meanwhile may be lost too
        const changed = missed || fresh.revision !== pulse.revision || JSON.stringify(fresh.worker) !== JSON.stringify(pulse.worker);
        pulse = fresh;
        if (missed) {
          lost = 0;
          document.body.classList.remove('g-lost');
        }
        for (const listener of listeners) listener(pulse);
        if (changed && shown && mounted[shown]) call(shown, 'change', pulse);
      } catch (error) {
        if (error.status === 401) location.reload();
        lost += 1;
        if (lost === 3) {
          document.body.classList.add('g-lost');
          for (const listener of listeners) listener(pulse);
        }
      } finally {
        beating = null;
      }
    })();
    return beating;
  }

  setInterval(() => { if (!document.hidden) refresh(); }, PULSE);
  document.addEventListener('visibilitychange', () => { if (!document.hidden) refresh(); });

  // -- screens ----------------------------------------------------------------------------------------

  function call(name, method, ...args) {
    const screen = screens[name];
    if (!screen || !screen[method]) return;
    Promise.resolve().then(() => screen[method](...args)).catch((error) => {
      if (error instanceof Failure) {
        if (error.status) toast(error.message, 'error');
      } else {
        console.warn(error);
        toast('This screen met a problem; reload the page to go on.', 'error');
      }
    });
  }

  function screen(name, parts) { screens[name] = parts; }

  function mount(name, node) {
    if (mounted[name] === node) return;
    if (!screens[name]) {  // its script is still on the way
      setTimeout(() => mount(name, node), 20);
      return;
    }
    mounted[name] = node;
    node.classList.add(`g-${name}`);
    call(name, 'mount', node);
    if (name === 'header') return;
    let visible = false;
    new ResizeObserver(() => {
      const now = node.offsetParent !== null && node.isConnected;
      if (now === visible) return;
      visible = now;
      if (now) {
        const there = where();
        if (restoring && there.screen !== name && screens[there.screen]) return;  // open() is on its way elsewhere
        shown = name;
        if (there.screen !== name) history.replaceState(null, '', address(name, {}));
        call(name, 'show', there.screen === name ? there.args : {});
      } else call(name, 'hide');
    }).observe(node);
  }

  const address = (name, args) => {
    const query = new URLSearchParams(Object.entries(args).filter(([, value]) => !missing(value) && value !== '')).toString();
    return `#${name}${query ? `?${query}` : ''}`;
  };

  function where() {
    const [name, query] = location.hash.slice(1).split('?');
    return { screen: name || '', args: Object.fromEntries(new URLSearchParams(query || '')) };
  }

  /* A screen's tab. On narrow pages Gradio moves tabs into a menu, without their ids: found there by their title. */
  function tabOf(name) {
    const tab = document.getElementById(`tab-${name}-button`);
    if (tab) return tab;
    const place = Object.keys(screens).filter((key) => key !== 'header').indexOf(name);  // in the order of the tabs
    const titles = [...document.querySelectorAll('#g-tabs .tab-container.visually-hidden button')];
    const menu = [...document.querySelectorAll('#g-tabs .overflow-dropdown button')];
    return titles[place] && menu.find((item) => item.textContent.trim() === titles[place].textContent.trim());
  }

  function open() {
    const there = where();
    if (!screens[there.screen] || there.screen === 'header') return;
    const tab = tabOf(there.screen);
    if (tab && tab.getAttribute('aria-selected') !== 'true') tab.click();
    else if (there.screen === shown) call(shown, 'show', there.args);
  }

  function go(name, args = {}) {
    const target = address(name, args);
    if (location.hash === target) open();
    else location.hash = target;  // fires hashchange
  }

  /* Note what is on screen in the address, without a step in the browser's history. Not once the address names another
     screen: that one is on its way, and would be called back. */
  function note(name, args) {
    if (shown === name && where().screen === name) history.replaceState(null, '', address(name, args));
  }

  window.addEventListener('hashchange', open);
  const PATIENCE = 15000;  // ms
  let since = 0;
  const settled = setInterval(() => {  // Gradio builds its tabs after our scripts ran, and listens later still
    if (!document.getElementById('tab-train-button')) return;
    since = since || Date.now();
    const wanted = where().screen;
    const arrived = !screens[wanted] || wanted === 'header' || shown === wanted;
    if (arrived || Date.now() - since > PATIENCE) {
      restoring = false;
      clearInterval(settled);
    } else open();
  }, 30);

  // -- the header -------------------------------------------------------------------------------------

  screen('header', {
    mount(root) {
      const status = h('button', { class: 'g-status', type: 'button', title: 'Show the run' });
      const theme = h('button', { class: 'g-icon', type: 'button' });
      const wanted = recall('theme', null);
      const set = (isDark) => {
        document.body.classList.toggle('dark', isDark);
        theme.replaceChildren(icon(isDark ? 'sun' : 'moon'));
        theme.setAttribute('aria-label', isDark ? 'Light theme' : 'Dark theme');
        document.dispatchEvent(new CustomEvent('grpo-theme'));
      };
      const system = matchMedia('(prefers-color-scheme: dark)');
      set(wanted === null ? system.matches : wanted === 'dark');
      system.addEventListener('change', () => { if (recall('theme', null) === null) set(system.matches); });
      theme.addEventListener('click', () => { remember('theme', dark() ? 'light' : 'dark'); set(!dark()); });
      let target = null;
      status.addEventListener('click', () => { if (target) go('live', { run: target }); });
      const title = document.title;
      listeners.push(({ active, worker }) => {
        const run = active.find((item) => item.state !== 'queued') || active[0];
        target = run ? run.id : null;
        status.disabled = !target;
        const waiting = active.filter((item) => item.state === 'queued' && item !== run).length;
        if (lost >= 3) fill(status, state('failed', 'The app does not answer'));
        else if (run) {
          fill(status, state(run.state), h('span', { class: 'g-name' }, run.name),
            h('span', { class: 'g-quiet' }, run.state === 'queued' ? null : [h('span', { class: 'g-word' }, 'step '), `${run.step} / ${run.total}`]), waiting ? h('span', { class: 'g-quiet' }, `${waiting} waiting`) : null);
        } else if (worker.engine === 'loading') fill(status, h('span', { class: 'g-quiet' }, 'loading the engine'));
        else if (worker.engine === 'failed') fill(status, state('failed', worker.problem));
        else fill(status, h('span', { class: 'g-quiet' }, 'no run'));
        document.title = run && run.state !== 'queued' ? `${run.step}/${run.total} ${run.name}` : title;
      });
      root.append(h('div', { class: 'g-brand' }, h('span', { class: 'g-mark', 'aria-hidden': 'true' }), 'Pure GRPO'), status, theme);
      refresh();
    },
  });

  Object.assign(grpo, { screen, mount, go, note, where, refresh, onPulse(listener) { listeners.push(listener); } });
  Object.defineProperty(grpo, 'pulse', { get: () => pulse });
})();
