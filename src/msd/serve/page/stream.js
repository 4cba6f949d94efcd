// Requests to the server: answers as streams of steps, and the gain of an image.

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function send(path, key, body, signal) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    Object.assign(options, { method: 'POST', body: JSON.stringify(body) });
    headers['content-type'] = 'application/json';
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refused('the server does not answer; is it still running?', 0);
  }
  if (response.ok) return response;
  const wait = response.headers.get('retry-after');
  const said = await response.json().then((answer) => answer.error.message).catch(() => `status ${response.status}`);
  throw new Refused(wait && !said.includes(`${wait} s`) ? `${said}; try again in ${wait} s` : said, response.status);
}

export async function ask(path, key, body, signal) {
  return (await send(path, key, body, signal)).json();
}

// Yields the objects of a stream of server-sent events; throws Refused for one with an error.
export async function* stream(path, key, body, signal) {
  const response = await send(path, key, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused('the connection ended before the answer did', 0);
    text += value;
    const events = text.split('\n\n');
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, '');
      if (data === '[DONE]') return;
      const object = JSON.parse(data);
      if (object.error) throw new Refused(object.error.message, 0);
      yield object;
    }
  }
}

// part: of a message, with a photo or a recording; null for none.
export function messages(question, part) {
  return [{ role: 'user', content: [...(part ? [part] : []), { type: 'text', text: question }] }];
}
