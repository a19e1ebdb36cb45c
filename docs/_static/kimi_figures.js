// Figures to touch: numbers stand as JSON in the page, and are drawn here as SVG. Nothing is loaded from elsewhere.
(() => {
  const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D3B", "#7A7A7A"];
  const SVG = "http://www.w3.org/2000/svg";
  const make = (name, attributes = {}, text = null) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    return element;
  };
  const html = (name, attributes = {}, text = null) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    return element;
  };
  const short = (v) => (Math.abs(v) >= 1000 ? `${+(v / 1000).toPrecision(3)}k` : `${+v.toPrecision(3)}`);
  const ticks = (low, high, n = 5) => {
    const raw = (high - low) / n || 1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw);
    const found = [];
    for (let v = Math.ceil(low / step) * step; v <= high + 1e-9 * step; v += step) found.push(Math.abs(v) < 1e-12 ? 0 : v);
    return found;
  };
  const status = (root) => {
    const line = html("p", { class: "knb-said", "aria-live": "polite" });
    root.append(line);
    return (text) => { line.textContent = text; };
  };

  // --- effects of the parts, with intervals, at each size ---
  const effects = (root, data) => {
    let view = data.views[0];
    const shown = new Set(view.sizes.map((s) => s.name));
    const views = html("div", { class: "knb-switches", role: "group", "aria-label": "average, or with one optimizer" });
    const buttons = html("div", { class: "knb-switches", role: "group", "aria-label": "sizes" });
    const place = html("div"), W = 520, LEFT = 112, ROW = 24, TOP = 8;
    root.append(views, place, buttons);
    const say = status(root);
    const draw = () => {
      const sizes = view.sizes.filter((s) => shown.has(s.name));
      const all = data.views.flatMap((v) => v.sizes).flatMap((s) => s.effects).filter(Boolean).flatMap((e) => [e.low, e.high]);
      const reach = 1.1 * Math.max(data.margin, ...all.map(Math.abs));
      const group = ROW * Math.max(1, sizes.length) + 12, H = TOP + group * data.parts.length + 44;
      const x = (v) => LEFT + ((v + reach) / (2 * reach)) * (W - LEFT - 12);
      const label = `Effect of each part on ${data.label}, with 95% intervals`;
      const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label, style: "max-width: 36rem" });
      svg.append(make("rect", { x: x(-data.margin), y: TOP, width: x(data.margin) - x(-data.margin), height: H - 52, class: "knb-margin" }));
      svg.append(make("line", { x1: x(0), x2: x(0), y1: TOP, y2: H - 44, class: "knb-zero" }));
      for (const t of ticks(-reach, reach, 6)) {
        svg.append(make("line", { x1: x(t), x2: x(t), y1: H - 44, y2: H - 39, class: "knb-axis" }));
        svg.append(make("text", { x: x(t), y: H - 25, "text-anchor": "middle" }, short(t)));
      }
      svg.append(make("text", { x: LEFT, y: H - 6, class: "knb-small" }, data.better === "lower" ? "← better" : "← worse"));
      svg.append(make("text", { x: W - 12, y: H - 6, "text-anchor": "end", class: "knb-small" }, `${data.label} (${data.unit}), with minus without`));
      data.parts.forEach((part, i) => {
        const top = TOP + i * group;
        svg.append(make("text", { x: LEFT - 10, y: top + group / 2 + 4, "text-anchor": "end", class: "knb-part" }, part));
        sizes.forEach((size, j) => {
          const e = size.effects[i];
          if (!e) return;
          const y = top + 6 + ROW * (j + 0.5), color = COLORS[view.sizes.indexOf(size) % COLORS.length];
          const words = `${part} at ${size.name}: ${e.diff.toFixed(4)} ${data.unit} (95% interval ${e.low.toFixed(4)} to ${e.high.toFixed(4)}), ${e.word}`;
          const mark = make("g", { tabindex: 0, role: "img", "aria-label": words, class: "knb-mark" });
          mark.append(make("title", {}, words));
          mark.append(make("rect", { x: LEFT, y: y - ROW / 2, width: W - LEFT, height: ROW, fill: "transparent" }));
          mark.append(make("line", { x1: x(e.low), x2: x(e.high), y1: y, y2: y, stroke: color, "stroke-width": 5 }));
          mark.append(make("circle", { cx: x(e.diff), cy: y, r: 6, fill: color, class: "knb-dot" }));
          for (const event of ["pointerenter", "focus", "click"]) mark.addEventListener(event, () => say(words + "."));
          svg.append(mark);
        });
      });
      place.replaceChildren(svg);
    };
    const choose = data.views.map((one) => {
      const button = html("button", { type: "button", "aria-pressed": String(one === view) }, one.name);
      button.addEventListener("click", () => {
        view = one;
        choose.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        draw();
      });
      return button;
    });
    views.append(...choose);
    view.sizes.forEach((size, i) => {
      const button = html("button", { type: "button", "aria-pressed": "true", title: size.about }, size.name);
      button.style.setProperty("--knb-color", COLORS[i % COLORS.length]);
      button.addEventListener("click", () => {
        if (shown.has(size.name) && shown.size > 1) shown.delete(size.name);
        else shown.add(size.name);
        button.setAttribute("aria-pressed", shown.has(size.name));
        draw();
      });
      buttons.append(button);
    });
    say("Touch a line for its numbers; grey: the margin within which a difference does not matter.");
    draw();
  };

  // --- curves over training: mean and range of the seeds of each arm ---
  const curves = (root, data) => {
    let block = data.blocks[0], logarithmic = false, from = 0;
    const hidden = new Set();
    const tools = html("div", { class: "knb-switches" }), legend = html("div", { class: "knb-switches", role: "group", "aria-label": "arms" });
    const place = html("div");
    root.append(tools, place, legend);
    const say = status(root);
    const W = 720, H = 340, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 40;
    const draw = () => {
      const arms = block.arms.filter((a) => !hidden.has(a.name));
      const ends = arms.flatMap((a) => a.step), last = Math.max(...ends), first = from * last;
      const inside = arms.flatMap((a) => a.step.flatMap((s, i) => (s >= first ? [a.low[i], a.high[i]] : [])));
      const f = logarithmic ? Math.log10 : (v) => v, back = logarithmic ? (v) => 10 ** v : (v) => v;
      let [low, high] = [Math.min(...inside), Math.max(...inside)].map(f);
      const pad = 0.05 * (high - low) || 0.1;
      low -= pad; high += pad;
      const x = (s) => LEFT + ((s - first) / (last - first || 1)) * (W - LEFT - RIGHT);
      const y = (v) => TOP + ((high - f(v)) / (high - low)) * (H - TOP - BOTTOM);
      const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${data.y} over ${data.x}` });
      for (const t of ticks(low, high)) {
        const at = y(back(t));
        svg.append(make("line", { x1: LEFT, x2: W - RIGHT, y1: at, y2: at, class: "knb-grid" }));
        svg.append(make("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, short(back(t))));
      }
      for (const t of ticks(first, last)) svg.append(make("text", { x: x(t), y: H - 22, "text-anchor": "middle" }, short(t)));
      svg.append(make("text", { x: W - RIGHT, y: H - 5, "text-anchor": "end", class: "knb-small" }, data.x));
      svg.append(make("text", { x: 4, y: H - 5, class: "knb-small" }, data.y));
      for (const arm of arms) {
        const color = COLORS[block.arms.indexOf(arm) % COLORS.length];
        const kept = arm.step.map((s, i) => i).filter((i) => arm.step[i] >= first);
        const up = kept.map((i) => `${x(arm.step[i])},${y(arm.high[i])}`), down = kept.map((i) => `${x(arm.step[i])},${y(arm.low[i])}`).reverse();
        svg.append(make("polygon", { points: [...up, ...down].join(" "), fill: color, opacity: 0.16 }));
        const line = kept.map((i) => `${x(arm.step[i])},${y(arm.mean[i])}`).join(" ");
        svg.append(make("polyline", { points: line, fill: "none", stroke: color, "stroke-width": 2.2 }));
      }
      const ruler = make("line", { y1: TOP, y2: H - BOTTOM, class: "knb-zero", visibility: "hidden" });
      svg.append(ruler);
      svg.addEventListener("pointermove", (event) => {
        const box = svg.getBoundingClientRect();
        const wanted = first + (((event.clientX - box.left) / box.width) * W - LEFT) / (W - LEFT - RIGHT) * (last - first);
        const steps = [...new Set(arms.flatMap((a) => a.step))].filter((s) => s >= first);
        const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a), steps[0]);
        ruler.setAttribute("x1", x(step)); ruler.setAttribute("x2", x(step)); ruler.setAttribute("visibility", "visible");
        const told = arms.filter((a) => a.step.includes(step)).map((a) => [a.name, a.mean[a.step.indexOf(step)]]).sort((a, b) => a[1] - b[1]);
        say(`${data.x} ${step}: ` + told.map(([name, v]) => `${name} ${v.toFixed(3)}`).join(" · "));
      });
      place.replaceChildren(svg);
      legend.replaceChildren(...block.arms.map((arm, i) => {
        const button = html("button", { type: "button", "aria-pressed": String(!hidden.has(arm.name)) }, arm.name);
        button.style.setProperty("--knb-color", COLORS[i % COLORS.length]);
        button.addEventListener("click", () => {
          if (hidden.has(arm.name)) hidden.delete(arm.name);
          else if (arms.length > 1) hidden.add(arm.name);
          draw();
        });
        return button;
      }));
    };
    if (data.blocks.length > 1) {
      const choose = html("select", { "aria-label": "block" });
      data.blocks.forEach((b, i) => choose.append(html("option", { value: i }, b.name)));
      choose.addEventListener("change", () => { block = data.blocks[choose.value]; hidden.clear(); draw(); });
      tools.append(choose);
    }
    const log = html("button", { type: "button", "aria-pressed": "false" }, "logarithmic");
    log.addEventListener("click", () => { logarithmic = !logarithmic; log.setAttribute("aria-pressed", logarithmic); draw(); });
    const zoom = html("button", { type: "button", "aria-pressed": "false" }, "last half");
    zoom.addEventListener("click", () => { from = from ? 0 : 0.5; zoom.setAttribute("aria-pressed", Boolean(from)); draw(); });
    tools.append(log, zoom);
    say("Move over the figure for the numbers of a step; press a name to hide its line.");
    draw();
  };

  const KINDS = { effects, curves };
  document.addEventListener("DOMContentLoaded", () => {
    for (const root of document.querySelectorAll(".knb-figure")) {
      const data = JSON.parse(root.querySelector("script").textContent);
      root.querySelector(".knb-still")?.remove();
      KINDS[data.kind](root, data);
    }
  });
})();
