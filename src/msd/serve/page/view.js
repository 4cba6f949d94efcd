// Shows one answer: its tokens, the draft tree of a step, statistics by modality, and the gain of the image.

import { draw, summary, visible } from './tree.js';

const $ = (id) => document.getElementById(id);

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export class View {
  // frames: shows those of a recording.
  constructor(frames) {
    this.settings = { formats: [], colours: {}, other: '#999', crop: false };
    this.frames = frames;
    $('tokens').addEventListener('keydown', (event) => this.#move(event));
    $('tokens').addEventListener('click', (event) => this.#pick(event.target.closest('.token')));
    $('step').addEventListener('input', () => this.#showStep(Number($('step').value), false));
    this.clear();
  }

  clear() {
    this.tokens = []; // {id, text, accepted, modality, step}; step: number from 1, 0 for the first token
    this.steps = [];
    this.gains = null;
    this.selected = -1;
    this.following = true; // whether the newest step is shown
    this.kinds = new Set();
    for (const id of ['tokens', 'tree', 'counts', 'totals', 'legend', 'map']) $(id).replaceChildren();
    $('blocks').replaceChildren();
    this.frames.shade(null);
    $('detail').textContent = 'Each token of the answer appears here as it is emitted.';
    $('step-note').textContent = 'What the drafter proposed in a step, and what the target accepted of it.';
    Object.assign($('step'), { disabled: true, max: 1, value: 1 });
    $('step-number').value = '–';
  }

  colour(kind) {
    return this.settings.colours[kind] ?? this.settings.other;
  }

  // Adds a step of the answer, as the server's field `msd.step` has it.
  add(step) {
    if (step.tree) this.steps.push(step);
    for (const token of step.tokens) {
      const at = this.tokens.push({ ...token, step: step.tree ? this.steps.length : 0 }) - 1;
      const span = element('span', visibleToken(token.text), { class: 'token', role: 'option', 'aria-selected': 'false' });
      span.tabIndex = at === 0 ? 0 : -1;
      span.dataset.at = at;
      span.dataset.modality = token.modality ?? '';
      if (token.accepted) span.classList.add('accepted');
      if (token.modality) span.style.setProperty('--kind', this.colour(token.modality));
      $('tokens').append(span);
    }
    if (step.tree && this.following) this.#showStep(this.steps.length, true);
    Object.assign($('step'), { max: Math.max(1, this.steps.length), disabled: !this.steps.length });
    this.#count();
  }

  showGains(gains) {
    this.gains = gains;
    this.#count();
    if (this.selected >= 0) this.#select(this.selected);
    else this.#showMap(sumOf(partsOf(gains)), 'all tokens together', gains.gain.reduce((a, b) => a + b, 0));
  }

  #pick(span) {
    if (span) this.#select(Number(span.dataset.at));
  }

  #move(event) {
    const last = this.tokens.length - 1, now = Math.max(this.selected, 0);
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, ArrowDown: now + 10, ArrowUp: now - 10, Home: 0, End: last,
      Enter: now, ' ': now }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    const at = this.selected < 0 && event.key.startsWith('Arrow') ? 0 : Math.min(last, Math.max(0, to));
    this.#select(at);
    $('tokens').children[at].focus();
  }

  #select(at) {
    const spans = $('tokens').children, token = this.tokens[at];
    for (const span of $('tokens').querySelectorAll('[tabindex="0"], [aria-selected="true"]')) {
      span.tabIndex = -1;
      span.setAttribute('aria-selected', 'false');
    }
    this.selected = at;
    spans[at].tabIndex = 0;
    spans[at].setAttribute('aria-selected', 'true');
    const origin = token.accepted ? 'an accepted draft' : token.step ? 'the target’s own (bonus)' : 'the target’s first';
    const facts = [token.modality ?? 'no modality predicted', origin, token.step ? `step ${token.step}` : 'prefill'];
    if (this.gains) facts.push(`gain of the image ${this.gains.gain[at].toFixed(3)} nats`);
    $('detail').textContent = `“${visible(token.text)}”: ${facts.join(', ')}`;
    if (token.step) this.#showStep(token.step, false);
    if (this.gains) this.#showMap(partsOf(this.gains)?.[at], `“${token.text.trim()}”`, this.gains.gain[at]);
  }

  #showStep(number, newest) {
    this.following = newest || number === this.steps.length;
    const step = this.steps[number - 1];
    Object.assign($('step'), { max: this.steps.length, value: number });
    $('step').setAttribute('aria-valuetext', `step ${number} of ${this.steps.length}`);
    $('step-number').value = `${number} of ${this.steps.length}`;
    $('tree').replaceChildren(draw(step, (kind) => this.colour(kind)));
    $('step-note').textContent = summary(step);
  }

  // parts: the gain of each block of the photo, or of each frame of the recording.
  #showMap(parts, what, whole) {
    const most = parts ? Math.max(...parts, 1e-9) : 0, kind = this.gains.frames ? 'frame' : 'block';
    const which = this.gains.frames ? ` (${parts.indexOf(Math.max(...parts)) + 1})` : '';
    $('map').textContent = `Gain of the image at ${what}: ${whole.toFixed(3)} nats` + (parts
      ? `; its largest ${kind}${which} alone ${most.toFixed(3)}; redder is more.`
      : '. A map needs one image whose tokens form a square.');
    if (!parts) return;
    if (this.gains.frames) return this.frames.shade(parts);
    const side = this.gains.side, grid = $('blocks');
    if (grid.children.length !== parts.length) grid.replaceChildren(...parts.map(() => element('i')));
    grid.style.gridTemplate = `repeat(${side}, 1fr) / repeat(${side}, 1fr)`;
    grid.style.inset = this.settings.crop ? middle($('image')) : '0';
    parts.forEach((nats, i) => { grid.children[i].style.opacity = (0.7 * Math.max(0, nats)) / Math.max(most, 0.02); });
  }

  // Statistics: totals, and a row for each modality.
  #count() {
    const rows = new Map();
    const row = (kind) => rows.get(kind) ?? rows.set(kind, { tokens: 0, gain: 0, drafted: 0, accepted: 0 }).get(kind);
    this.tokens.forEach((token, i) => {
      const own = row(token.modality ?? 'not predicted');
      own.tokens += 1;
      if (this.gains) own.gain += this.gains.gain[i];
    });
    let drafted = 0, accepted = 0;
    for (const step of this.steps) {
      for (const node of step.tree.nodes) {
        const own = row(node.modality);
        own.drafted += 1;
        own.accepted += node.accepted;
        drafted += 1;
        accepted += node.accepted;
      }
    }
    const mean = this.steps.length ? (this.tokens.length - 1) / this.steps.length : 0;
    const totals = [['tokens', this.tokens.length], ['target passes after prefill', this.steps.length],
      ['tokens per pass, τ', mean.toFixed(2)], ['drafted', drafted], ['accepted', accepted]];
    $('totals').replaceChildren(...totals.map(([name, value]) => {
      const group = element('div');
      group.append(element('dt', name), element('dd', value));
      return group;
    }));
    $('counts').replaceChildren(...[...rows].sort(([a], [b]) => (a < b ? -1 : 1)).map(([kind, n]) => this.#row(kind, n)));
    if (this.kinds.size !== rows.size) this.#legend(rows.keys());
  }

  #row(kind, n) {
    const made = element('tr'), head = element('th', kind, { scope: 'row' });
    head.style.setProperty('--kind', this.colour(kind));
    const gain = this.gains && n.tokens ? (n.gain / n.tokens).toFixed(3) : '–';
    const rate = n.drafted ? `${Math.round((100 * n.accepted) / n.drafted)} %` : '–';
    made.append(head, ...[n.tokens, gain, n.drafted, n.accepted, rate].map((value) => element('td', value)));
    return made;
  }

  #legend(kinds) {
    this.kinds = new Set(kinds);
    const marks = [['accepted draft', 'mark accepted'], ['the target’s own token', 'mark'],
      ...[...this.kinds].filter((kind) => kind in this.settings.colours).map((kind) => [kind, 'mark accepted', kind])];
    $('legend').replaceChildren(...marks.map(([name, classes, kind]) => {
      const item = element('li'), mark = element('span', name, { class: classes });
      if (kind) mark.style.setProperty('--kind', this.colour(kind));
      item.append(mark);
      return item;
    }));
  }
}

// Tokens of an incomplete character have no text of their own.
const visibleToken = (text) => (text === '' ? '·' : text);

const partsOf = (gains) => gains.blocks ?? gains.frames;

const sumOf = (parts) => parts?.reduce((sum, token) => sum.map((nats, i) => nats + token[i]));

// The square in the middle of an image, as the CSS property `inset`.
function middle(image) {
  const { naturalWidth: width, naturalHeight: height } = image, side = Math.min(width, height);
  return `${(50 * (height - side)) / height}% ${(50 * (width - side)) / width}%`;
}
