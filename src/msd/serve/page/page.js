// The page of `msd serve`: asks about a photo or a recording and shows how the answer is decoded.

import { Frames } from './recording.js';
import { Refused, ask, messages, stream } from './stream.js';
import { View } from './view.js';

const $ = (id) => document.getElementById(id);
const CHAT = 'v1/chat/completions', LARGEST = 20_000_000; // bytes of a file, as the server takes them
const frames = new Frames(), view = new View(frames);
let part = null; // of the message: the photo or the recording
let running = null; // AbortController
let asked = null; // the shown answer and its messages, if it is about the shown file

// theme

const THEMES = ['automatic', 'light', 'dark'];

function setTheme(theme) {
  if (theme === 'automatic') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $('theme').textContent = `Theme: ${theme}`;
  $('theme').dataset.theme = theme;
}

$('theme').addEventListener('click', () => {
  const next = THEMES[(THEMES.indexOf($('theme').dataset.theme) + 1) % THEMES.length];
  setTheme(next);
  try { localStorage.setItem('theme', next); } catch { /* a browser without storage forgets the theme */ }
});

function storedTheme() {
  try { return localStorage.getItem('theme'); } catch { return null; }
}

setTheme(THEMES.includes(storedTheme()) ? storedTheme() : 'automatic');

// photo or recording

// uri: of the photo that is shown; null for none, or for a recording, whose frames come later.
function show(chosen, uri) {
  part = chosen;
  frames.clear();
  $('photo').hidden = !uri;
  $('remove').hidden = !chosen;
  $('image').alt = 'the photo of the question';
  if (uri) $('image').src = uri;
  else $('image').removeAttribute('src');
  $('blocks').replaceChildren();
  $('map').textContent = '';
  asked = null;
  $('measure').disabled = true;
}

const extension = (file) => file.name.toLowerCase().match(/[^.]*$/)[0];

function read(file) {
  say('');
  if (!file) return;
  const { formats } = view.settings, recorded = formats.includes(`.${extension(file)}`);
  if (!recorded && !file.type.startsWith('image/')) {
    return say(`“${file.name}” is not an image or a recording; choose PNG, JPEG, WebP, or one of ${formats.join(', ')}`);
  }
  if (file.size > LARGEST) return say(`the file is larger than ${LARGEST / 1e6} MB; resize or cut it`);
  const reader = new FileReader();
  reader.onload = () => {
    if (recorded) showRecording({ url: reader.result, format: extension(file) });
    else show({ type: 'image_url', image_url: { url: reader.result } }, reader.result);
  };
  reader.onerror = () => say(`“${file.name}” cannot be read`);
  reader.readAsDataURL(file);
}

// Has the server draw the frames of a recording; one that it refuses is removed.
async function showRecording(recording) {
  const chosen = { type: 'events_url', events_url: recording };
  show(chosen, null);
  $('remove').hidden = false;
  try {
    if (!view.settings.model) await connect();
    const body = { model: view.settings.model, messages: [{ role: 'user', content: [chosen] }] };
    const drawn = await ask('v1/msd/frames', $('key').value, body);
    if (part !== chosen) return;
    $('photo').hidden = false;
    frames.show(drawn, view.settings.events);
  } catch (error) {
    if (part !== chosen) return;
    show(null, null);
    fail(error);
  }
}

$('image').addEventListener('error', () => { if (part) say('this browser cannot show the photo; the server may'); });
$('file').addEventListener('change', () => read($('file').files[0]));
$('remove').addEventListener('click', () => { $('file').value = ''; show(null, null); $('file').focus(); });
for (const kind of ['dragenter', 'dragover', 'dragleave', 'drop']) {
  $('drop').addEventListener(kind, (event) => {
    event.preventDefault();
    $('drop').classList.toggle('over', kind === 'dragenter' || kind === 'dragover');
    if (kind === 'drop') read(event.dataTransfer.files[0]);
  });
}
document.addEventListener('paste', (event) => {
  const file = event.clipboardData.files[0];
  if (file) { event.preventDefault(); read(file); }
});

// asking

function say(message) {
  $('error').textContent = message;
}

function fail(error) {
  if (error.name === 'AbortError') return;
  if (!(error instanceof Refused)) { say('the page failed; reload it'); throw error; }
  if (error.status === 401) $('locked').hidden = false;
  say(error.message);
}

function request(more) {
  const temperature = Number($('temperature').value);
  const sampled = temperature > 0 ? { seed: Math.floor(Math.random() * 2 ** 31) } : {};
  return {
    model: view.settings.model, messages: messages($('question').value, part), temperature, ...sampled,
    max_tokens: Number($('most').value), stream: true, ...more,
  };
}

// Reads one answer; returns its text, its number of tokens, and tokens per second after the first.
async function answer(body, onStep, rate, bar) {
  let text = '', count = 0, first = null, speed = 0;
  for await (const event of stream(CHAT, $('key').value, body, running.signal)) {
    text += event.choices[0]?.delta.content ?? '';
    const step = event.msd?.step;
    if (!step) continue;
    count += step.tokens.length;
    first ??= performance.now();
    const seconds = (performance.now() - first) / 1000;
    speed = count > 1 && seconds > 0 ? (count - 1) / seconds : 0;
    $(rate).value = speed ? `${speed.toFixed(1)} tokens/s` : '…';
    $(bar).dataset.speed = speed;
    scaleBars();
    onStep(step, text);
  }
  return { text, count, speed };
}

function scaleBars() {
  const bars = [$('bar-drafts'), $('bar-plain')], most = Math.max(...bars.map((bar) => bar.dataset.speed || 0), 1e-9);
  for (const bar of bars) bar.style.width = `${(100 * (bar.dataset.speed || 0)) / most}%`;
}

async function run() {
  const shown = part, body = request({ msd: { trace: true } });
  const drafted = await answer(body, (step) => view.add(step), 'rate-drafts', 'bar-drafts');
  if (shown && shown === part) asked = { messages: body.messages, tokens: view.tokens.map((token) => token.id) };
  $('status').textContent = `Answer: ${drafted.text}`;
  if (!$('compare').checked) return;
  $('plain').hidden = false;
  const plainly = { ...body, msd: { method: 'ar', trace: true } };
  const write = (_, text) => { $('plain-text').textContent = text; };
  const plain = await answer(plainly, write, 'rate-plain', 'bar-plain');
  const ratio = plain.speed ? `${(drafted.speed / plain.speed).toFixed(2)} times as fast with drafts. ` : '';
  const same = drafted.text === plain.text ? 'Both answers are identical.' : `The answers differ (policy: ${view.settings.policy}).`;
  $('compared').textContent = ratio + same;
}

function busy(active) {
  $('go').disabled = active;
  $('stop').disabled = !active;
  $('answer').setAttribute('aria-busy', active);
  $('measure').disabled = active || !asked;
}

$('ask').addEventListener('submit', async (event) => {
  event.preventDefault();
  say('');
  view.clear();
  asked = null;
  for (const bar of ['bar-drafts', 'bar-plain']) $(bar).dataset.speed = 0;
  scaleBars();
  $('rate-drafts').value = '…';
  $('rate-plain').value = $('compare').checked ? 'next' : 'not run';
  $('compared').textContent = $('plain-text').textContent = $('status').textContent = '';
  $('plain').hidden = true;
  running = new AbortController();
  busy(true);
  $('answer').scrollIntoView({ block: 'nearest' });
  try {
    if (!view.settings.model) await connect();
    await run();
  } catch (error) {
    fail(error);
  } finally {
    busy(false);
  }
});

$('stop').addEventListener('click', () => running?.abort());

$('measure').addEventListener('click', async () => {
  say('');
  running = new AbortController();
  busy(true);
  $('map').textContent = 'measuring …';
  try {
    const body = { model: view.settings.model, ...asked };
    view.showGains(await ask('v1/msd/gain', $('key').value, body, running.signal));
  } catch (error) {
    $('map').textContent = '';
    fail(error);
  } finally {
    busy(false);
  }
});

async function connect() {
  view.settings = await ask('v1/msd', $('key').value);
  const { model, method, policy, epsilon } = view.settings;
  $('served').textContent = `${model}, method ${method}, ${policy}${epsilon ? `, ε ${epsilon}` : ''}`;
  $('file').accept = ['image/*', ...view.settings.formats].join(',');
}

connect().catch((error) => { $('served').textContent = 'not connected'; fail(error); });
