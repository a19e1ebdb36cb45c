/* a chart that is pointed at: values under the pointer; drag for a closer look, double click for the whole */
if (!this.knb) {
  this.knb = true;
  const chart = this, inner = chart.querySelector('svg');
  const made = (name, about, text) => {
    const element = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const key in about) element.setAttribute(key, about[key]);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const [left, top, wide, high] = inner.getAttribute('viewBox').split(' ').map(Number);
  const [across, upright] = JSON.parse(chart.dataset.axes);
  let view = [left, top, wide, high], from = null;
  const lines = [...inner.querySelectorAll('polyline[data-name]')].map(line => ({
    name: line.dataset.name,
    color: line.getAttribute('stroke'),
    points: line.getAttribute('points').split(' ').map(point => point.split(',').map(Number)),
  }));
  const value = (axis, place) => {
    const [low, end, start, stop, log] = axis;
    const found = low + (place - start) / (stop - start) * (end - low);
    return log ? 10 ** found : found;
  };
  const place = (axis, number) => {
    const [low, end, start, stop, log] = axis;
    return start + ((log ? Math.log10(number) : number) - low) / (end - low) * (stop - start);
  };
  const words = number => {
    const size = Math.abs(number);
    return size && (size < 1e-3 || size >= 1e5) ? number.toExponential(2) : String(+number.toPrecision(4));
  };
  const into = x => view[0] + (x - left) / wide * view[2];
  const out = ([x, y]) => [left + (x - view[0]) / view[2] * wide, top + (y - view[1]) / view[3] * high];
  const at = event => new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
  const inside = x => Math.min(Math.max(x, left), left + wide);
  const shown = chart.appendChild(made('g', {'pointer-events': 'none', class: 'knb-hover'}));
  const mark = chart.appendChild(made('rect', {y: top, height: high, width: 0, fill: 'var(--knb-1)', opacity: 0.15}));
  const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);

  const tell = event => {
    const {x, y} = at(event);
    shown.replaceChildren();
    if (x < left || x > left + wide || y < top || y > top + high || !lines.length) return;
    const key = nearest(lines.flatMap(line => line.points), into(x))[0];
    const found = lines.map(line => [line, nearest(line.points, key)]).filter(([, p]) => Math.abs(p[0] - key) < view[2] / 12);
    const [where] = out([key, 0]);
    shown.append(made('line', {x1: where, x2: where, y1: top, y2: top + high, stroke: 'var(--knb-soft)', 'stroke-width': 0.8}));
    const texts = [['var(--knb-ink)', `${chart.dataset.across} ${words(value(across, key))}`]];
    for (const [line, point] of found) {
      const [cx, cy] = out(point);
      shown.append(made('circle', {cx, cy, r: 3, fill: line.color}));
      texts.push([line.color, `${words(value(upright, point[1]))} ${line.name}`]);
    }
    const width = 12 + 5.6 * Math.max(...texts.map(([, text]) => text.length));
    const begin = where + width + 8 > left + wide ? Math.max(0, where - width - 8) : where + 8;
    const look = {fill: 'var(--knb-ground)', stroke: 'var(--knb-line)', opacity: 0.92};
    shown.append(made('rect', {x: begin, y: top + 2, width, height: 8 + 13 * texts.length, rx: 3, ...look}));
    texts.forEach(([color, text], k) => {
      shown.append(made('text', {x: begin + 6, y: top + 14 + 13 * k, 'font-size': 10, style: `fill:${color}`}, text));
    });
  };

  const rounds = (low, end) => {
    const rough = (end - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find(k => k * power >= rough) * power;
    const found = [];
    for (let number = Math.ceil(low / step) * step; number <= end + 1e-9 * step; number += step) found.push(number);
    return found;
  };
  const whole = chart.querySelector('.knb-ticks').cloneNode(true);
  const grid = () => {
    const ticks = made('g', {class: 'knb-ticks'});
    const line = {stroke: 'var(--knb-line)', 'stroke-width': 0.7};
    for (const number of rounds(value(upright, view[1] + view[3]), value(upright, view[1]))) {
      const [, y] = out([0, place(upright, number)]);
      ticks.append(made('line', {x1: left, x2: left + wide, y1: y, y2: y, ...line}));
      ticks.append(made('text', {x: left - 5, y: y + 3.5, 'font-size': 10, 'text-anchor': 'end', class: 'soft'}, words(number)));
    }
    for (const number of rounds(value(across, view[0]), value(across, view[0] + view[2]))) {
      const [x] = out([place(across, number), 0]);
      const about = {x, y: top + high + 14, 'font-size': 10, 'text-anchor': 'middle', class: 'soft'};
      ticks.append(made('text', about, words(number)));
    }
    return ticks;
  };
  const show = (next, ticks) => {
    view = next;
    inner.setAttribute('viewBox', view.join(' '));
    inner.setAttribute('preserveAspectRatio', 'none');
    chart.querySelector('.knb-ticks').replaceWith(ticks());
    shown.replaceChildren();
  };
  const closer = (x1, x2) => {
    const [low, end] = [into(x1), into(x2)];
    const heights = lines.flatMap(line => line.points).filter(([x]) => x >= low && x <= end).map(([, y]) => y);
    if (heights.length < 2) return;
    const [up, down] = [Math.min(...heights), Math.max(...heights)], room = 0.08 * (down - up) || 1;
    show([low, up - room, end - low, down - up + 2 * room], grid);
  };

  chart.addEventListener('pointermove', event => {
    if (from === null) return tell(event);
    const x = inside(at(event).x);
    mark.setAttribute('x', Math.min(from, x));
    mark.setAttribute('width', Math.abs(x - from));
  });
  chart.addEventListener('pointerdown', event => { from = inside(at(event).x); event.preventDefault(); });
  chart.addEventListener('pointerup', event => {
    const begin = from, x = inside(at(event).x);
    from = null;
    mark.setAttribute('width', 0);
    if (begin !== null && Math.abs(x - begin) > 8) closer(Math.min(begin, x), Math.max(begin, x));
  });
  chart.addEventListener('pointerleave', () => { from = null; mark.setAttribute('width', 0); shown.replaceChildren(); });
  chart.addEventListener('dblclick', () => show([left, top, wide, high], () => whole.cloneNode(true)));
}
