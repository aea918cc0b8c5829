/* The blind test: which of two pictures fits the prompt better? Texts and names stay hidden until the choice. */
'use strict';

(() => {
  const { h, fill } = grpo;
  const gallery = grpo.gallery = grpo.gallery || {};
  const KEYS = { ArrowLeft: 'left', ArrowRight: 'right', ArrowDown: 'neither' };
  let parts = null, now = null, found = null, of = null, reveal = null, busy = false, active = false, turn = 0;

  /* What is wanted now. `of` is what `found` was asked with, and `now` may have moved on: answers go to `of`. */
  const asked = () => ({ run: now.run, at: now.overview.at, compare: now.compare });
  const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
  const problem = (error) => grpo.toast(error.message, 'error');

  // -- drawing ----------------------------------------------------------------------------------------

  function shot(side, pair) {
    const file = reveal ? reveal[side].image : pair[side];
    const picture = reveal && reveal[side];
    const chosen = reveal && reveal.choice === side;
    const text = reveal ? reveal.text : pair.text;
    return h('figure', { class: chosen ? 'chosen' : '' },
      h('button', { type: 'button', class: 'g-gallery-shot', disabled: Boolean(reveal), 'aria-label': `The ${side} picture fits better`, onclick: () => choose(side) }, gallery.shot(file, `${side} picture`, { loading: 'eager' })),
      picture ? h('figcaption', {}, h('strong', {}, picture.label), chosen ? h('span', { class: 'g-chip changed' }, 'your choice') : null,
        reveal.clip_prefers === side ? h('span', { class: 'g-chip' }, 'CLIP\u2019s choice') : null, gallery.scores(picture), gallery.rewrite(text, picture.arm, picture)) : null);
  }

  function draw() {
    const pair = reveal || found.pairs[0];
    grpo.text(parts.progress, `${found.answers.toLocaleString()} of ${found.total.toLocaleString()} pairs answered`
      + (found.equal ? `; ${found.equal.toLocaleString()} more are left out, as both rewrites, and so both pictures, are the same or one is missing` : ''));
    result();
    parts.all.removeAttribute('aria-busy');
    parts.stage.hidden = !pair;
    parts.done.hidden = Boolean(pair);
    parts.undo.disabled = parts.clear.disabled = found.answers === 0;
    if (!pair) {
      fill(parts.done, found.total ? 'You have seen every pair.' : 'The two arms wrote the same rewrites, so there is nothing to choose between.');
      return;
    }
    grpo.text(parts.text, pair.text);
    parts.pair.replaceChildren(shot('left', pair), shot('right', pair));
    parts.choices.hidden = Boolean(reveal);
    parts.next.hidden = !reveal;
    found.pairs.slice(0, 3).forEach((item) => ['left', 'right'].forEach((side) => { new Image().src = `/grpo/pictures/${item[side]}`; }));
  }

  function result() {
    const { tally } = found;
    const share = tally.decided ? tally.won / tally.decided : null;
    fill(parts.result, h('h2', {}, 'What you preferred'),
      share === null ? null : [h('p', { class: 'g-gallery-big' }, grpo.percent(share), h('small', {}, `of ${tally.decided}, the ${gallery.name(of.compare.split('_vs_')[0]).toLowerCase()} one`)),
        gallery.interval({ mean: share, low: tally.low, high: tally.high }, { zero: 0.5, from: 0, to: 1, label: '50 %' })],
      h('p', {}, tally.sentence),
      h('p', { class: 'g-small g-quiet' }, 'Only your choices are kept, in the database of the runs; nothing about you. The interval takes them as independent, which they are until prompts come a second time.'));
  }

  /* Until the first pair of another question is here: the old one is gone, and its place is kept. */
  function wait() {
    found = reveal = null;
    const blank = () => h('figure', {}, h('div', { class: 'g-picture' }));
    parts.all.setAttribute('aria-busy', 'true');
    parts.stage.hidden = parts.choices.hidden = false;
    parts.done.hidden = parts.next.hidden = parts.undo.disabled = parts.clear.disabled = true;
    grpo.text(parts.text, '\u2026');
    grpo.text(parts.progress, 'Loading the pairs\u2026');
    parts.pair.replaceChildren(blank(), blank());
  }

  function failed(error) {
    parts.all.removeAttribute('aria-busy');
    parts.stage.hidden = true;
    parts.done.hidden = false;
    grpo.text(parts.progress, '');
    fill(parts.result);
    fill(parts.done, error.message, ' ', grpo.button('Try again', load, { kind: 'small' }));
  }

  // -- acting -----------------------------------------------------------------------------------------

  /* What the server says of `question` becomes what is shown; false when something else was asked for meanwhile. */
  async function settle(question, asking) {
    const mine = turn += 1;
    const answer = await asking;
    if (mine !== turn) return false;
    found = answer;
    of = question;
    return true;
  }

  async function act(action) {
    if (busy) return;
    busy = true;
    try {
      if (await action()) draw();
    } catch (error) {
      problem(error);
    } finally {
      busy = false;
    }
  }

  function choose(choice) {
    const pair = found && found.pairs[0], question = of;
    if (reveal || !pair) return;
    act(async () => {
      if (!await settle(question, grpo.post('gallery/choose', { ...question, prompt: pair.prompt, index: pair.index, choice }))) return false;
      reveal = parts.show.checked ? { ...found.reveal, text: pair.text } : null;
      return true;
    });
  }

  function next() {
    reveal = null;
    draw();
  }

  const forget = (which, question = of) => act(async () => {
    if (!await settle(question, grpo.post('gallery/forget', { ...question, which }))) return false;
    reveal = null;
    return true;
  });

  async function clear() {
    const question = of;  // a run that goes on may bring another while the person thinks
    if (await grpo.confirm(`Delete your ${found.answers} answers about these two arms? This can't be taken back.`, 'Delete answers', 'danger')) await forget('all', question);
  }

  function key(event) {
    if (!active || !found || document.querySelector('dialog[open]') || event.target.matches('input[type="search"], select, textarea') || event.ctrlKey || event.metaKey || event.altKey) return;
    if (reveal) {
      if (!['Enter', ' ', 'ArrowRight'].includes(event.key) || event.target.closest('button')) return;
      event.preventDefault();
      next();
    } else if (KEYS[event.key]) {
      event.preventDefault();
      choose(KEYS[event.key]);
    } else if (event.key === 'Backspace' && found.answers) {
      event.preventDefault();
      forget('last');
    }
  }

  async function load() {
    const question = asked(), asking = settle(question, grpo.get('gallery/blind', question)), mine = turn;
    try {
      if (await asking) draw();
    } catch (error) {
      if (mine !== turn) return;
      if (!found) failed(error);
      throw error;
    }
  }

  function mount(host) {
    const choice = (side, label, hint, kind) => h('button', { type: 'button', class: ['g-button', kind], onclick: () => choose(side) }, label, h('kbd', {}, hint));
    parts = {
      progress: h('p', { class: 'g-quiet g-small' }), text: h('p', { class: 'g-gallery-asked' }), pair: h('div', { class: 'g-gallery-pair' }),
      done: h('p', { class: 'g-quiet' }), result: h('div', { class: 'g-stack g-tight g-gallery-result' }),
      choices: h('div', { class: 'g-gallery-choices' }, choice('left', 'Left', '\u2190', 'primary'), choice('neither', 'Can\u2019t say', '\u2193', ''), choice('right', 'Right', '\u2192', 'primary')),
      next: h('div', { class: 'g-gallery-choices' }, h('button', { type: 'button', class: 'g-button primary', onclick: next }, 'Next pair', h('kbd', {}, 'Enter'))),
      show: h('input', { type: 'checkbox', checked: grpo.recall('gallery.reveal', false), onchange: (event) => grpo.remember('gallery.reveal', event.target.checked) }),
      undo: grpo.button('Take the last one back', () => forget('last'), { kind: 'small' }),
      clear: grpo.button('Delete answers', clear, { kind: 'small danger' }),
    };
    parts.stage = h('div', { class: 'g-gallery-blind-stage' }, h('p', { class: 'g-quiet' }, 'Which picture fits this prompt better?'), parts.text, parts.pair, parts.choices, parts.next);
    parts.all = h('div', { class: 'g-gallery-two' }, h('div', { class: 'g-card' }, parts.stage, parts.done),
      h('div', { class: 'g-card g-stack' }, parts.result, h('hr', { class: 'g-rule' }), parts.progress, h('label', { class: 'g-check' }, parts.show, 'Show the answer after each choice'), h('div', { class: 'g-row' }, parts.undo, parts.clear)));
    host.append(parts.all);
    document.addEventListener('keydown', key);
  }

  gallery.blind = {
    async show(state, host) {
      now = state;
      active = true;
      if (!parts) mount(host);
      if (found && same(of, asked())) return busy ? undefined : load();  // an answer on its way brings the next pair
      wait();
      return load();
    },
    hide() { active = false; },
    refresh() { if (active && !busy && !reveal) load().catch(problem); },
  };
})();
