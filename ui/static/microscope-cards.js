/* The microscope's pieces: tokens with their figures, a rollout's card, a group's card, one rollout large.

   A look is {view, order, shade, scales}: how texts are shown, the order of the rewrites, what tokens are shaded
   by (an entry of the answer's `shades`), and where each shade's color is strongest. */
'use strict';

grpo.microscopeParts = (() => {
  const { h, fill, num, signed, text } = grpo;
  const name = (part) => `g-microscope-${part}`;
  const known = (x) => x !== null && x !== undefined;
  const fixed = (x, places) => (known(x) ? x.toFixed(places).replace('-', '\u2212') : num(null));

  // -- tokens -----------------------------------------------------------------------------------------

  const figures = new WeakMap();  // a token's element -> what is told of it

  /* What token `i` is shaded by; null where it was not recorded. */
  function amount(shade, rollout, i) {
    const column = rollout.tokens[shade === 'product' ? 'shift' : shade];
    if (!column || !known(column[i])) return null;
    if (shade !== 'product') return column[i];
    return known(rollout.advantage) ? column[i] * rollout.advantage : null;
  }

  function tokenLine(rollout, look) {
    if (!rollout.tokens) return h('span', { class: 'g-quiet' }, 'Tokens were not recorded.');
    const line = h('span', { class: name('tokens'), role: 'group', 'aria-label': `Tokens of rewrite ${rollout.k + 1}; left and right move between them` });
    rollout.tokens.text.forEach((token, i) => {
      const value = amount(look.shade.name, rollout, i);
      const size = value === null ? 0 : (look.shade.signed ? Math.abs(value) : Math.max(0, value)) / look.scales[look.shade.name];
      const kind = size < 0.05 ? '' : !look.shade.signed ? 'size' : value < 0 ? 'against' : 'along';
      const node = h('span', { class: [name('token'), kind], tabindex: i ? -1 : 0, style: { '--size': `${Math.round(62 * Math.min(1, size))}%` } },
        token.replace(/\n/g, '\u21b5\n') || '\u2205');
      figures.set(node, { rollout, i });
      line.append(node);
    });
    return line;
  }

  const tip = h('div', { class: name('tip'), id: name('tip'), role: 'tooltip', popover: 'manual' });

  function tell(node) {
    const { rollout, i } = figures.get(node);
    const { tokens, advantage } = rollout;
    const of = (column) => (tokens[column] ? tokens[column][i] : null);
    const logprob = of('logprob'), shift = of('shift');
    const line = (label, value, unit = '') => [h('dt', {}, label), h('dd', {}, value, unit ? h('span', { class: 'g-quiet' }, ` ${unit}`) : null)];
    fill(tip, h('div', { class: 'g-mono' }, `\u201c${tokens.text[i]}\u201d`), h('dl', {},
      line('Log-probability', num(logprob), 'nats, when sampled'),
      line('Probability', known(logprob) ? grpo.percent(Math.exp(logprob), 1) : num(null)),
      line('Entropy', num(of('entropy')), 'nats'),
      line('KL', fixed(of('kl'), 4), 'nats, estimate'),
      known(shift) ? line('Change', signed(shift, 3), `nats${shift > 0 ? ', likelier than untrained' : shift < 0 ? ', less likely than untrained' : ''}`)
        : line('Change', 'not recorded'),
      known(shift) && known(advantage) ? line('Advantage \u00d7 change', signed(shift * advantage, 3)) : null));
    if (!tip.isConnected) grpo.page().append(tip);
    if (tip.matches(':popover-open')) tip.hidePopover();  // shown anew it is above a dialog that has opened since
    tip.showPopover();
    const at = node.getClientRects()[0], { offsetWidth: wide, offsetHeight: high } = tip;
    const below = at.bottom + 6 + high <= innerHeight;
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - wide - 8))}px`;
    tip.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - high - 6)}px`;
    node.setAttribute('aria-describedby', tip.id);
  }

  const hush = () => { if (tip.isConnected && tip.matches(':popover-open')) tip.hidePopover(); };

  /* Pointer, focus and keys of all token lines inside `root`. */
  function wireTokens(root) {
    const token = (event) => event.target.closest && event.target.closest(`.${name('token')}`);
    const show = (event) => { if (token(event)) tell(token(event)); };
    const hide = (event) => { if (token(event)) hush(); };
    root.addEventListener('pointerover', show);
    root.addEventListener('focusin', show);
    root.addEventListener('pointerout', hide);
    root.addEventListener('focusout', hide);
    root.addEventListener('scroll', hush, true);
    root.addEventListener('keydown', (event) => {
      const here = token(event);
      if (!here) return;
      const { parentNode: line } = here;
      const target = { ArrowLeft: here.previousSibling, ArrowRight: here.nextSibling, Home: line.firstChild, End: line.lastChild }[event.key];
      if (event.key === 'Escape') hush();
      if (target === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      if (target) target.focus();
    });
  }

  // -- texts and figures ------------------------------------------------------------------------------

  function words(rollout, group, look) {
    if (look.view === 'tokens') return tokenLine(rollout, look);
    if (!rollout.parsed) return h('span', { class: 'g-mono' }, rollout.text.trim() ? rollout.text : '(empty)');
    return look.view === 'changes' ? grpo.diff(group.prompt, rollout.text) : h('span', {}, rollout.text);
  }

  const count = (rollout) => `${known(rollout.count) ? rollout.count : num(null)} tokens`;

  /* The parts that make up a reward, where they say more than the reward itself does. */
  function partsLine(rollout, group, data) {
    const counted = data.parts.filter((part) => part.weight && known(rollout.parts[part.name]));
    const [only] = counted;
    if (counted.length === 1 && Math.abs(only.weight * rollout.parts[only.name] - rollout.reward) < 1e-3) return only.weight === 1 ? only.name : `${only.weight} \u00d7 ${only.name}`;
    return counted.map((part) => `${part.name} ${fixed(rollout.parts[part.name], group.places)}`).join(' \u00b7 ');
  }

  function setBar(fillNode, advantage, most) {
    const share = known(advantage) ? Math.min(1, Math.abs(advantage) / most) * 50 : 0;
    fillNode.className = advantage < 0 ? 'against' : 'along';
    fillNode.style.width = `${share}%`;
  }

  const ordered = (group, order) => (order === 'sampled' ? group.rollouts : [...group.rollouts].sort(
    (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity) || a.k - b.k));

  const alt = (rollout, group) => `Picture of rewrite ${rollout.k + 1}: ${rollout.text}, reward ${fixed(rollout.reward, group.places)}`;

  const noPicture = (rollout, data) => (!rollout.parsed ? 'no picture: not readable' : data.pictures.kept ? 'no picture' : 'not kept');

  /* Pictures drawn larger than they are keep their pixels; larger ones are shrunk smoothly. */
  function image() {
    const node = h('img', { class: 'g-picture', loading: 'lazy', decoding: 'async', draggable: 'false' });
    node.addEventListener('load', () => node.classList.toggle('g-smooth', node.naturalWidth >= 192));
    return node;
  }

  function setPicture(img, none, path, rollout, group, data) {
    const source = path ? `/grpo/pictures/${path}` : '';
    img.hidden = !path;
    none.hidden = Boolean(path);
    if (path) {
      if (img.getAttribute('src') !== source) img.setAttribute('src', source);
      if (img.alt !== alt(rollout, group)) img.alt = alt(rollout, group);
    } else {
      img.removeAttribute('src');
      text(none, noPicture(rollout, data));
    }
  }

  // -- cards ------------------------------------------------------------------------------------------

  /* One rollout; the same elements show whichever rollout comes to this place. */
  class RolloutCard {
    constructor(open) {
      this.img = image();
      this.none = h('span', { class: 'g-picture g-none' });
      this.button = h('button', { type: 'button', class: name('picture'), onclick: () => open(this.rollout) }, this.img, this.none);
      this.reward = h('span', { class: name('reward') });
      this.parts = h('span', { class: 'g-quiet g-small' });
      this.number = h('span', { class: 'g-faint g-small g-push' });
      this.bar = h('span');
      this.advantage = h('span', { class: name('advantage') });
      this.words = h('div', { class: name('words') });
      this.figures = h('div', { class: [name('figures'), 'g-quiet g-small'] });
      this.node = h('article', { class: name('card'), role: 'listitem' }, this.button,
        h('div', { class: name('line') }, this.reward, this.parts, this.number),
        h('div', { class: name('line') }, h('span', { class: name('bar'), 'aria-hidden': 'true' }, this.bar), this.advantage),
        this.words, this.figures);
    }

    update(rollout, group, data, look) {
      this.rollout = rollout;
      this.node.dataset.k = rollout.k;
      this.button.hidden = !data.pictures.any;
      setPicture(this.img, this.none, rollout.thumbnail || rollout.image, rollout, group, data);
      const label = `Open rewrite ${rollout.k + 1}`;
      if (this.button.getAttribute('aria-label') !== label) this.button.setAttribute('aria-label', label);
      text(this.reward, fixed(rollout.reward, group.places));
      this.reward.title = 'Reward';
      text(this.parts, partsLine(rollout, group, data));
      const twin = known(rollout.same_as) ? rollout.same_as + 1 : 0;
      text(this.number, twin ? `#${rollout.k + 1} = #${twin}` : `#${rollout.k + 1}`);
      this.number.title = twin ? `Word for word the same rewrite as #${twin}, so the same picture` : 'Number in the order of sampling';
      setBar(this.bar, rollout.advantage, data.scales.advantage);
      text(this.advantage, signed(rollout.advantage));
      this.advantage.title = data.advantage;
      const key = `${data.run} ${data.step} ${group.g} ${rollout.k} ${look.view} ${look.view === 'tokens' ? look.shade.name : ''}`;
      if (this.key !== key) {
        this.key = key;
        this.words.replaceChildren(words(rollout, group, look));
        this.words.scrollTop = 0;
      }
      fill(this.figures, h('span', { title: 'Mean KL estimate towards the untrained policy, nats a token' }, `KL ${fixed(rollout.kl, 3)}`), h('span', {}, count(rollout)),
        rollout.parsed ? null : h('span', { class: ['g-chip', name('bad')], title: 'No rewrite could be read from this completion; it is shown as it came' }, 'not readable'),
        rollout.finished ? null : h('span', { class: ['g-chip', name('warn')], title: 'It reached the token limit before it ended' }, 'cut off'));
    }
  }

  /* One group: its prompt, its figures, its rollouts. open(group, rollout) shows one large. */
  class GroupCard {
    constructor(open) {
      this.cards = [];
      this.open = open;
      this.tier = h('span', { class: 'g-chip' });
      this.prompt = h('h3', {});
      this.facts = h('div', { class: [name('facts'), 'g-quiet'] });
      this.lesson = h('p', { class: [name('lesson'), 'g-small'] });
      this.grid = h('div', { class: name('grid'), role: 'list' });
      this.node = h('section', { class: ['g-card', name('group')] }, h('header', {}, this.tier, this.prompt, this.facts), this.lesson, this.grid);
    }

    update(group, data, look) {
      this.group = group;
      this.node.dataset.g = group.g;
      this.node.setAttribute('aria-label', `Group of ${group.prompt}`);
      text(this.tier, group.tier);
      text(this.prompt, group.prompt);
      const fact = (label, value, title) => h('span', { title }, `${label} `, h('b', {}, value));
      fill(this.facts, fact('mean reward', fixed(group.mean, group.places), 'Mean reward of the group'),
        fact('spread', fixed(group.spread, group.places), 'Standard deviation of the group\u2019s rewards'),
        fact('distinct', `${group.distinct} of ${group.rollouts.length}`, 'Different rewrites among the group\u2019s'),
        group.failures ? fact('not readable', String(group.failures), 'Completions no rewrite could be read from') : null,
        h('span', { class: 'g-faint', title: `The seed of the starting noise that all pictures of this group share: ${group.seed}` }, `noise ${group.seed.slice(-4)}`));
      text(this.lesson, group.lesson);
      this.lesson.hidden = !group.lesson;
      const rollouts = ordered(group, look.order);
      while (this.cards.length > rollouts.length) this.cards.pop().node.remove();
      rollouts.forEach((rollout, place) => {
        if (!this.cards[place]) {
          this.cards[place] = new RolloutCard((shown) => this.open(this.group, shown));
          this.grid.append(this.cards[place].node);
        }
        this.cards[place].update(rollout, group, data, look);
      });
    }
  }

  // -- one rollout, large -----------------------------------------------------------------------------

  /* A dialog on the step as it was when it opened; arrow keys go through its rollouts, group after group. */
  function openLarge(data, look, group, rollout) {
    const all = data.groups.flatMap((one) => ordered(one, look.order).map((item) => ({ group: one, rollout: item })));
    let place = all.findIndex((item) => item.group === group && item.rollout === rollout);
    const img = image(), none = h('div', { class: 'g-picture g-none' });
    img.setAttribute('loading', 'eager');
    const prompt = h('p', {}), rewrite = h('p', {}), line = h('div', {}), facts = h('table', { class: 'g-table' }), where = h('span', { class: 'g-quiet' });
    const step = (by, glyph, label) => h('button', { type: 'button', class: 'g-icon', 'aria-label': label, onclick: () => move(by) }, grpo.icon(glyph));
    const part = (label, ...content) => h('div', {}, h('div', { class: 'g-quiet g-small' }, label), content);
    const content = h('div', { class: name('large') },
      h('div', { class: 'g-stack g-tight' }, img, none, h('div', { class: 'g-row' }, step(-1, 'left', 'Previous rewrite'), where, step(1, 'right', 'Next rewrite'))),
      h('div', { class: 'g-stack' }, part('Original prompt', prompt), part('Rewrite, what changed', rewrite),
        part(`Tokens, shaded by ${look.shade.label.toLowerCase()}`, line), facts));
    const dialog = grpo.dialog('', content);
    dialog.node.classList.add('g-large');
    const title = dialog.node.querySelector('h2');
    wireTokens(dialog.node);
    dialog.closed.then(hush);

    function draw() {
      const { group: of, rollout: one } = all[place];
      setPicture(img, none, one.image, one, of, data);
      text(title, `Step ${data.step}, rewrite ${one.k + 1} of \u201c${of.prompt}\u201d`);
      dialog.node.setAttribute('aria-label', title.textContent);
      text(where, `${place + 1} of ${all.length}, by ${look.order === 'sampled' ? 'order of sampling' : 'reward in each group'}`);
      text(prompt, of.prompt);
      rewrite.replaceChildren(words(one, of, { ...look, view: 'changes' }));
      line.replaceChildren(tokenLine(one, look));
      const row = (label, value, note = '') => h('tr', {}, h('td', {}, label), h('td', { class: 'g-number' }, value), h('td', { class: 'g-quiet' }, note));
      fill(facts, h('tbody', {},
        row('Reward', fixed(one.reward, of.places), `group: mean ${fixed(of.mean, of.places)}, spread ${fixed(of.spread, of.places)}`),
        data.parts.map((item) => (known(one.parts[item.name]) ? row(item.name, num(one.parts[item.name], 4), `weight ${item.weight}${item.weight ? '' : ', not part of the reward'}: ${item.means}`) : null)),
        row('Advantage', signed(one.advantage, 3), data.advantage.replace(/^Advantage: /, '').replace(/\.$/, '')),
        row('KL', num(one.kl), 'nats a token, estimate, towards the untrained policy'),
        row('Length', known(one.count) ? String(one.count) : num(null), `tokens; ${one.finished ? 'ended by itself' : 'cut off at the limit'}`),
        row('Picture', one.parsed ? 'drawn' : 'none', one.parsed ? `from noise ${of.seed}, shared by the group` : 'the completion could not be read as a rewrite')));
    }

    function move(by) {
      hush();
      place = (place + by + all.length) % all.length;
      draw();
    }

    dialog.node.addEventListener('keydown', (event) => {
      if (event.defaultPrevented || (event.key !== 'ArrowLeft' && event.key !== 'ArrowRight')) return;  // a token's own
      event.preventDefault();
      move(event.key === 'ArrowLeft' ? -1 : 1);
    });
    draw();
  }

  return { GroupCard, openLarge, wireTokens };
})();
