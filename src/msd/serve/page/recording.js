// Shows the frames of an event camera's recording: one of them large, chosen with a slider, and a strip of all.

const $ = (id) => document.getElementById(id);

export class Frames {
  constructor() {
    $('frame-at').addEventListener('input', () => this.pick(Number($('frame-at').value)));
    $('strip').addEventListener('click', (event) => {
      const at = [...$('strip').children].indexOf(event.target.closest('.thumb'));
      if (at >= 0) this.pick(at + 1);
    });
    this.clear();
  }

  clear() {
    this.frames = []; // {image, events, begin, end}, as the server's answer has them
    $('recording').hidden = true;
    $('frame').classList.remove('drawn');
    $('strip').replaceChildren();
  }

  // drawn: the answer of v1/msd/frames. reads: whether the drafter reads the events.
  show(drawn, reads) {
    this.frames = drawn.frames;
    $('recording').hidden = false;
    $('frame').classList.add('drawn');
    $('strip').replaceChildren(...this.frames.map(({ image }) => {
      const thumb = document.createElement('span'), picture = document.createElement('img');
      thumb.className = 'thumb';
      picture.src = image;
      picture.alt = '';
      thumb.append(picture, document.createElement('i'));
      return thumb;
    }));
    Object.assign($('frame-at'), { max: this.frames.length, value: 1 });
    $('reads').textContent = `${drawn.events.toLocaleString('en')} events of ${drawn.size.join('×')} pixels. `
      + `The target sees these frames; the drafter reads ${reads ? 'the events' : 'no events'}.`;
    this.pick(1);
  }

  pick(number) {
    const { image, events, begin, end } = this.frames[number - 1], total = this.frames.length;
    const about = `${events.toLocaleString('en')} events in ${((end - begin) / 1000).toLocaleString('en')} ms`;
    $('image').src = image;
    $('image').alt = `frame ${number} of ${total} of the recording`;
    $('frame-at').value = number;
    $('frame-at').setAttribute('aria-valuetext', `frame ${number} of ${total}: ${about}`);
    $('frame-number').value = `${number} of ${total}`;
    $('frame-about').textContent = `${about}; red: brighter, blue: darker.`;
    [...$('strip').children].forEach((thumb, i) => thumb.classList.toggle('chosen', i === number - 1));
  }

  // Shades the frames by their gains in nats; null removes the shades.
  shade(gains) {
    const most = Math.max(...(gains ?? [0]), 0.02);
    [...$('strip').children].forEach((thumb, i) => {
      thumb.lastChild.style.opacity = gains ? (0.7 * Math.max(0, gains[i])) / most : 0;
    });
  }
}
