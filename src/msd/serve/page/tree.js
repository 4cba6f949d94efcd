// Draws the draft tree of a step: depth to the right, one line for each leaf, edges in the colour of the subtree.

const WIDTH = 92, GAP = 26, LINE = 30, HEIGHT = 24, LETTERS = 9;

function element(name, attributes = {}, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function visible(text) {
  return text.replaceAll('\n', '⏎').replaceAll('\t', '⇥').replace(/^ | $/g, '␣') || '∅';
}

function short(text) {
  const letters = [...visible(text)];
  return letters.length > LETTERS ? letters.slice(0, LETTERS - 1).join('') + '…' : letters.join('');
}

// All nodes of a step: the root, its drafts, and the target's own token below the last accepted draft.
function nodesOf(step) {
  const root = { text: step.tree.root, parent: -1, depth: 0, kind: 'root', note: 'root: the newest token' };
  const drafts = step.tree.nodes.map((node) => ({
    ...node,
    kind: node.accepted ? 'accepted' : 'rejected',
    note: `${node.accepted ? 'accepted' : 'rejected'}, ${node.modality}, p ${node.p}${node.q === null ? '' : `, q ${node.q}`}`,
  }));
  const nodes = [root, ...drafts];
  const last = step.tokens.at(-1);
  if (last && !last.accepted) {
    const parent = Math.max(0, ...drafts.map((node, i) => (node.accepted ? i + 1 : 0)));
    nodes.push({ text: last.text, parent, modality: last.modality, kind: 'target', note: "the target's own token" });
  }
  return nodes;
}

// Sets `depth` and `line` of each node; returns the number of lines.
function place(nodes) {
  const below = nodes.map(() => []);
  nodes.forEach((node, i) => { if (node.parent >= 0) below[node.parent].push(i); });
  let lines = 0;
  const visit = (i, depth) => {
    nodes[i].depth = depth;
    if (!below[i].length) { nodes[i].line = lines++; return; }
    below[i].sort((a, b) => rank(nodes[a]) - rank(nodes[b]));
    below[i].forEach((child) => visit(child, depth + 1));
    nodes[i].line = nodes[below[i][0]].line;
  };
  visit(0, 0);
  return lines;
}

const rank = (node) => ['accepted', 'target', 'rejected'].indexOf(node.kind);

export function draw(step, colour) {
  const nodes = nodesOf(step);
  const lines = place(nodes);
  const x = (node) => 2 + node.depth * (WIDTH + GAP), y = (node) => 2 + node.line * LINE;
  const width = Math.max(...nodes.map(x)) + WIDTH + 2, height = (lines - 1) * LINE + HEIGHT + 4;
  const picture = element('svg', { width, height, role: 'img', 'aria-label': summary(step) });
  const painted = (made, node) => {
    if (node.modality) made.style.setProperty('--kind', colour(node.modality));
    return made;
  };
  for (const node of nodes.slice(1)) {
    const from = nodes[node.parent], x1 = x(from) + WIDTH, y1 = y(from) + HEIGHT / 2, y2 = y(node) + HEIGHT / 2;
    const d = `M${x1},${y1} C${x1 + GAP / 2},${y1} ${x1 + GAP / 2},${y2} ${x(node)},${y2}`;
    picture.append(painted(element('path', { d, class: node.kind }), node));
  }
  for (const node of nodes) {
    const box = element('rect', { x: x(node), y: y(node), width: WIDTH, height: HEIGHT, rx: 5 });
    const label = element('text', { x: x(node) + 8, y: y(node) + 16 }, short(node.text));
    const group = element('g', { class: node.kind }, element('title', {}, `“${node.text}”: ${node.note}`), box, label);
    picture.append(painted(group, node));
  }
  return picture;
}

export function summary(step) {
  const drafts = step.tree.nodes, accepted = drafts.filter((node) => node.accepted);
  const kinds = new Map();
  for (const node of drafts) kinds.set(node.modality, (kinds.get(node.modality) ?? 0) + 1);
  const subtrees = [...kinds].map(([name, count]) => `${name} ${count}`).join(', ');
  const times = `Draft ${milliseconds(step.draft_seconds)}, target pass ${milliseconds(step.pass_seconds)}.`;
  if (!drafts.length) return `Nothing was drafted in this step. ${times}`;
  const said = accepted.length ? `: “${accepted.map((node) => node.text).join('')}”` : '';
  return `${drafts.length} drafted (${subtrees}), ${accepted.length} accepted${said}. ${times}`;
}

const milliseconds = (seconds) => `${(1000 * seconds).toFixed(1)} ms`;
