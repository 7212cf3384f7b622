/* The drawing "what was kept" of one inspection, for the page of `fastav serve` and for single-file reports.
 *
 *   const viewer = FastavViewer.mount(element, inspection, options);
 *
 * It is a plain script with one global name, so that it works inlined in an HTML file that is opened from a disk.
 * The inspection's format is in docs/serve.md. Text of the inspection enters the page as text, never as HTML.
 */
globalThis.FastavViewer = (() => {
  "use strict";

  const DROPPED = 0,
    UNCACHED = 1,
    KEPT = 2; // what a layer does with a token
  const MEDIA = ["video", "image", "audio"];
  const ORDER = ["text", "audio", "video", "image"]; // of a stacked bar, from the bottom
  const GAP_FROM = 5; // a gap between patches is drawn from this many pixels per patch on
  const PLAY_SECONDS = 4.5;
  const MAGMA = [
    [0, 0, 4],
    [81, 18, 124],
    [183, 55, 121],
    [252, 137, 97],
    [252, 253, 191],
  ]; // the map of figures.py

  // ---------------------------------------------------------------- numbers and texts, shared with the pages around

  const grouped = new Intl.NumberFormat("en-US");
  const count = (n) => grouped.format(n);
  const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

  /** A number with three digits and a unit's prefix: 1.53 T. */
  function prefixed(value, unit) {
    const prefixes = ["", "k", "M", "G", "T", "P", "E"];
    let step = 0;
    while (Math.abs(value) >= 999.5 && step < prefixes.length - 1) {
      value /= 1000;
      step += 1;
    }
    const digits = value >= 99.95 || (step === 0 && Number.isInteger(value)) ? 0 : value >= 9.995 ? 1 : 2;
    return `${value.toFixed(digits)} ${prefixes[step]}${unit}`;
  }

  const flops = (value) => prefixed(value, "FLOPs");
  const bytes = (value) => prefixed(value, "B");

  function seconds(value) {
    if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
    return `${value.toFixed(value < 9.995 ? 2 : 1)} s`;
  }

  /** A moment of a clip: 3.5 s, or 1:03 from a minute on. */
  function moment(second) {
    if (second < 60) return `${second.toFixed(1)} s`;
    return `${Math.floor(second / 60)}:${String(Math.floor(second % 60)).padStart(2, "0")}`;
  }

  function share(ratio) {
    const percent = ratio * 100;
    return `${percent > 0 && percent < 9.95 ? percent.toFixed(1) : percent.toFixed(0)} %`;
  }

  function score(value) {
    const size = Math.abs(value);
    return size !== 0 && (size < 0.001 || size >= 1e5)
      ? value.toExponential(2)
      : Number(value.toPrecision(4)).toString();
  }

  /** What of a word is compared: not its punctuation, unless that is all by which the texts differ. */
  function wordKey(a, b, same) {
    const bare = (word) => word.trim().replace(/[.,;:!?]+$/, "");
    const differ = !same && a.map(bare).join(" ") !== b.map(bare).join(" ");
    return differ ? bare : (word) => word.trim();
  }

  /** The words of two texts, each with whether it is in both, by their longest common subsequence. */
  function compareTexts(left, right) {
    const a = left.match(/\s*\S+/g) || [],
      b = right.match(/\s*\S+/g) || [];
    const same = left.trim() === right.trim();
    const key = wordKey(a, b, same);
    const longest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        longest[i][j] =
          key(a[i]) === key(b[j]) ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
      }
    }
    const inBoth = [new Array(a.length).fill(false), new Array(b.length).fill(false)];
    for (let i = 0, j = 0; i < a.length && j < b.length;) {
      if (key(a[i]) === key(b[j])) {
        inBoth[0][i++] = inBoth[1][j++] = true;
      } else if (longest[i + 1][j] >= longest[i][j + 1]) {
        i++;
      } else {
        j++;
      }
    }
    const words = (list, marks) => list.map((text, i) => ({ text, same: marks[i] }));
    return { same, left: words(a, inBoth[0]), right: words(b, inBoth[1]) };
  }

  /** Write words of `compareTexts` into an element, with those marked that the other text lacks. */
  function writeWords(element, words) {
    element.replaceChildren(
      ...words.map(({ text, same }) => {
        if (same) return text;
        const lead = text.match(/^\s*/)[0];
        const fragment = document.createDocumentFragment();
        fragment.append(lead, make("mark", { text: text.slice(lead.length) }));
        return fragment;
      }),
    );
  }

  // ---------------------------------------------------------------- elements

  /** An element with a class, a text, attributes and children. */
  function make(tag, { name, text, children = [], ...attributes } = {}) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== undefined && value !== null) element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  const swatch = (modality) => make("i", { name: `fv-swatch fv-${modality}`, "aria-hidden": "true" });

  /** Give a canvas as many pixels as it has on the screen; return its context in CSS pixels, and its size. */
  function prepare(canvas) {
    const width = canvas.clientWidth,
      height = canvas.clientHeight,
      scale = globalThis.devicePixelRatio || 1;
    const columns = Math.round(width * scale),
      rows = Math.round(height * scale);
    if (canvas.width !== columns || canvas.height !== rows) {
      canvas.width = columns;
      canvas.height = rows;
    }
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    return { context, width, height, scale };
  }

  /** The colours of the theme in use, from the variables of viewer.css. */
  function palette(element) {
    const style = getComputedStyle(element);
    const colour = (name) => style.getPropertyValue(`--fv-${name}`).trim();
    return Object.fromEntries([...ORDER, "off", "hatch"].map((name) => [name, colour(name)]));
  }

  /** The colour of a share in [0, 1] on the map of scores. */
  function heatColour(value) {
    const at = value * (MAGMA.length - 1),
      low = Math.min(Math.floor(at), MAGMA.length - 2);
    const mixed = MAGMA[low].map((channel, i) => Math.round(channel + (MAGMA[low + 1][i] - channel) * (at - low)));
    return `rgb(${mixed.join(" ")})`;
  }

  const reducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

  // ---------------------------------------------------------------- the tokens of one inspection

  class Tokens {
    constructor(inspection) {
      const { tokens } = inspection;
      this.inspection = inspection;
      this.layers = inspection.layers;
      this.names = inspection.modalities;
      this.size = tokens.modality.length;
      this.modality = Uint8Array.from(tokens.modality);
      this.item = Int32Array.from(tokens.item);
      this.frame = Int32Array.from(tokens.frame);
      this.second = tokens.second;
      this.box = tokens.box;
      this.text = tokens.text;
      this.padding = tokens.padding;
      this.dropLayer = Int32Array.from(tokens.layers);
      this.cuts = [...inspection.cuts].sort((a, b) => a.layer - b.layer);
      this.places = new Map(); // of a cut's candidates, made when a score is asked for
      this.ranks = new Map(); // of a cut's candidates, as shares in [0, 1]
      this.hasScores = this.cuts.some((cut) => cut.score.some((value) => typeof value === "number"));
      this.perLayer = this._perLayer();
    }

    name(token) {
      return this.names[this.modality[token]];
    }

    /** Numbers of tokens by layer and modality, and of those that a cache-only cut leaves out of the layer's cache. */
    _perLayer() {
      const rows = Array.from({ length: this.layers }, () => ({
        runs: new Array(this.names.length).fill(0),
        cached: new Array(this.names.length).fill(0),
        total: 0,
        cachedTotal: 0,
      }));
      const dropped = rows.map((row) => row.runs.slice());
      for (let token = 0; token < this.size; token++) {
        const last = Math.min(this.dropLayer[token], this.layers) - 1;
        if (last >= 0) dropped[last][this.modality[token]] += 1;
      }
      const running = new Array(this.names.length).fill(0);
      for (let layer = this.layers - 1; layer >= 0; layer--) {
        dropped[layer].forEach((n, modality) => (running[modality] += n));
        rows[layer].runs = running.slice();
        rows[layer].cached = running.slice();
      }
      for (const cut of this.cuts.filter((cut) => cut.cache_only && cut.layer < this.layers)) {
        cut.token.forEach((token, i) => {
          if (!cut.kept[i] && this.dropLayer[token] > cut.layer) rows[cut.layer].cached[this.modality[token]] -= 1;
        });
      }
      const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
      for (const row of rows) [row.total, row.cachedTotal] = [sum(row.runs), sum(row.cached)];
      return rows;
    }

    /** What a layer does with every token: DROPPED, UNCACHED (it runs, but is not in this layer's cache) or KEPT. */
    states(layer) {
      const states = new Uint8Array(this.size);
      for (let token = 0; token < this.size; token++) states[token] = this.dropLayer[token] > layer ? KEPT : DROPPED;
      for (const cut of this.cuts) {
        if (!cut.cache_only || cut.layer !== layer) continue;
        cut.token.forEach((token, i) => {
          if (!cut.kept[i] && states[token] === KEPT) states[token] = UNCACHED;
        });
      }
      return states;
    }

    placeIn(cut, token) {
      if (!this.places.has(cut)) this.places.set(cut, new Map(cut.token.map((candidate, i) => [candidate, i])));
      return this.places.get(cut).get(token);
    }

    /** The cut nearest at or after a layer that scored a token; else the last one before. */
    cutOf(token, layer) {
      let before = null;
      for (const cut of this.cuts) {
        if (this.placeIn(cut, token) === undefined) continue;
        if (cut.layer >= layer) return cut;
        before = cut;
      }
      return before;
    }

    /** The rank of every token by the scores of the cut nearest at or after a layer, from 0 to 1; NaN without a score.
     *
     * Ranks, because scores of some methods differ by powers of ten.
     */
    heat(layer) {
      const scored = this.cuts.filter((cut) => cut.score.some((value) => typeof value === "number"));
      const cut = scored.find((one) => one.layer >= layer) || scored[scored.length - 1];
      if (!cut) return null;
      if (!this.ranks.has(cut)) {
        const ranks = new Float32Array(this.size).fill(NaN);
        const order = cut.token
          .map((_, i) => i)
          .filter((i) => typeof cut.score[i] === "number")
          .sort((a, b) => cut.score[a] - cut.score[b]);
        order.forEach((i, rank) => (ranks[cut.token[i]] = order.length > 1 ? rank / (order.length - 1) : 1));
        this.ranks.set(cut, ranks);
      }
      return this.ranks.get(cut);
    }

    dropCut(token) {
      return this.cuts.find(
        (cut) => !cut.cache_only && cut.layer === this.dropLayer[token] && this.placeIn(cut, token) !== undefined,
      );
    }

    /** Where a token comes from: "frame 3 at 1.5 s". */
    origin(token) {
      const parts = [];
      const item = this.inspection.items[this.item[token]];
      if (item && this.inspection.items.length > 1) parts.push(item.name);
      if (this.frame[token] >= 0 && item && item.kind !== "image") parts.push(`frame ${this.frame[token]}`);
      if (typeof this.second[token] === "number") parts.push(moment(this.second[token]));
      if (this.padding[token]) parts.push("padding");
      return parts.join(", ");
    }

    /** What a reader wants to know of one token at one layer, as lines. */
    describe(token, layer) {
      const lines = [];
      const name = this.text[token] ? `“${visible(this.text[token])}”` : `${this.name(token)} token`;
      const origin = this.origin(token);
      const cut = this.cutOf(token, layer);
      if (cut) lines.push(...this._scoreLines(cut, token));
      const drop = this.dropCut(token);
      if (this.dropLayer[token] >= this.layers)
        lines.push(cut && cut.cache_only ? this._cacheLine(token, layer) : `kept in all ${this.layers} layers`);
      else lines.push(`dropped at layer ${this.dropLayer[token]}${drop ? ` by ${drop.method}` : ""}`);
      return { title: name, detail: [`no. ${count(token)} of the prompt`, origin].filter(Boolean).join(" · "), lines };
    }

    _scoreLines(cut, token) {
      const value = cut.score[this.placeIn(cut, token)];
      if (typeof value !== "number") return [`candidate at layer ${cut.layer}, ${cut.method} gives no score`];
      const rank = cut.score.reduce((n, other) => n + (other > value ? 1 : 0), 1);
      return [
        `score ${score(value)} at layer ${cut.layer} (${cut.method})`,
        `rank ${count(rank)} of ${count(cut.token.length)}`,
      ];
    }

    _cacheLine(token, layer) {
      const out = this.cuts.filter((cut) => cut.cache_only && cut.kept[this.placeIn(cut, token)] === 0).length;
      const here = this.cuts.some(
        (cut) => cut.cache_only && cut.layer === layer && cut.kept[this.placeIn(cut, token)] === 0,
      );
      return `runs in all layers, left out of ${plural(out, "cache")}${here ? ", this one included" : ""}`;
    }

    /** Tokens in prompt order that pass a test. */
    where(test) {
      const found = [];
      for (let token = 0; token < this.size; token++) if (test(token)) found.push(token);
      return found;
    }
  }

  /** The text of a token, with white space that can be seen. */
  function visible(text) {
    return text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/, "␣").trim();
  }

  /** The share of tokens that a layer keeps, in its cache too. */
  function shareOf(tokens, states) {
    if (!tokens.length) return 0;
    let kept = 0;
    for (const token of tokens) if (states[token] === KEPT) kept += 1;
    return kept / tokens.length;
  }

  // ---------------------------------------------------------------- views: each draws some tokens
  //
  // A view has `element`, `tokens` (what the arrow keys visit, in prompt order), `at(x, y)` (the token at a place inside
  // the element, or -1), `place(token)` ([left, top, width, height] in it) and `draw(states, colours, changed)`:
  // `changed` is null for all tokens, `colours.heat` what `Tokens.heat` returns where scores are to be shown.
  // A view that scrolls has `reveal(token)`.

  class FramesView {
    constructor(data, index, tokens) {
      const item = data.inspection.items[index];
      this.tokens = tokens;
      this.element = make("ul", {
        name: `fv-frames${item.frames.length > 32 ? " fv-many" : ""}${item.frames.length === 1 ? " fv-single" : ""}`,
        role: "list",
      });
      const byFrame = new Map(item.frames.map((frame) => [frame.frame, []]));
      for (const token of tokens) byFrame.get(data.frame[token]).push(token);
      this.tiles = item.frames.map((frame) => this._tile(data, item, frame, byFrame.get(frame.frame)));
      this.tileOf = new Map(this.tiles.flatMap((tile) => tile.tokens.map((token) => [token, tile])));
      this.box = data.box;
      this.element.append(...this.tiles.map((tile) => tile.element));
    }

    _tile(data, item, frame, tokens) {
      const image = make("img", { alt: "", draggable: "false" });
      const canvas = make("canvas");
      const picture = make("div", { name: "fv-picture", children: [image, canvas] });
      picture.style.aspectRatio = `${frame.width || 16} / ${frame.height || 9}`;
      const bar = make("i"),
        value = make("b");
      const caption =
        item.kind === "image"
          ? "picture"
          : typeof frame.second === "number"
            ? moment(frame.second)
            : `frame ${frame.frame}`;
      const foot = make("div", { name: "fv-foot", children: [make("span", { text: caption }), value] });
      const element = make("li", {
        name: "fv-frame",
        children: [picture, make("div", { name: "fv-bar", children: [bar] }), foot],
      });
      bar.className = `fv-${item.kind === "image" ? "image" : "video"}`;
      const tile = {
        element,
        picture,
        image,
        canvas,
        bar,
        value,
        tokens,
        boxed: tokens.filter((token) => data.box[token]),
      };
      image.addEventListener("load", () => this.redraw && this.redraw(tile));
      if (frame.uri) image.src = frame.uri;
      return tile;
    }

    draw(states, colours, changed) {
      this.redraw = (tile) => this._drawTile(tile, states, colours);
      for (const tile of this.tiles) {
        if (!changed || tile.tokens.some((token) => changed[token])) this._drawTile(tile, states, colours);
      }
    }

    _drawTile(tile, states, colours) {
      const kept = shareOf(tile.tokens, states);
      tile.bar.style.width = `${kept * 100}%`;
      tile.value.textContent = tile.tokens.length ? share(kept) : "–";
      tile.element.style.setProperty("--fv-gone", tile.boxed.length ? 1 : 1 - kept);
      tile.element.classList.toggle("fv-patched", tile.boxed.length > 0);
      if (tile.boxed.length) this._drawPatches(tile, states, colours);
    }

    /** The kept patches in colour, above the picture, which is grey and faint below them. */
    _drawPatches(tile, states, colours) {
      const { context, width, height, scale } = prepare(tile.canvas);
      const loaded = tile.image.complete && tile.image.naturalWidth > 0;
      const all = tile.boxed.every((token) => states[token] === KEPT);
      for (const [state, alpha] of [
        [UNCACHED, 0.4],
        [KEPT, 1],
      ]) {
        const boxes = tile.boxed.filter((token) => states[token] === state).map((token) => this.box[token]);
        if (!boxes.length) continue;
        context.save();
        context.globalAlpha = alpha;
        context.beginPath();
        for (const box of boxes) context.rect(...patch(box, width, height, scale, all));
        context.clip();
        if (loaded) context.drawImage(tile.image, 0, 0, width, height);
        else {
          context.fillStyle = colours.video;
          context.fillRect(0, 0, width, height);
        }
        context.restore();
      }
      if (colours.heat) this._drawHeat(context, tile, states, colours.heat, width, height, scale);
    }

    _drawHeat(context, tile, states, heat, width, height, scale) {
      for (const token of tile.boxed) {
        if (states[token] === DROPPED || Number.isNaN(heat[token])) continue;
        context.fillStyle = heatColour(heat[token]);
        context.fillRect(...patch(this.box[token], width, height, scale, false));
      }
    }

    at(x, y) {
      const tile = this.tiles.find(({ element }) => inside(x, y, element));
      if (!tile) return -1;
      const { picture } = tile;
      const across = (x - tile.element.offsetLeft - picture.offsetLeft) / picture.clientWidth;
      const down = (y - tile.element.offsetTop - picture.offsetTop) / picture.clientHeight;
      const hit = tile.boxed.find((token) => within(this.box[token], across, down));
      if (hit !== undefined) return hit;
      return tile.boxed.length || !tile.tokens.length ? -1 : tile.tokens[0];
    }

    place(token) {
      const { element, picture } = this.tileOf.get(token);
      const left = element.offsetLeft + picture.offsetLeft,
        top = element.offsetTop + picture.offsetTop;
      const [y0, x0, y1, x1] = this.box[token] || [0, 0, 1, 1];
      const width = picture.clientWidth,
        height = picture.clientHeight;
      return [left + x0 * width, top + y0 * height, (x1 - x0) * width, (y1 - y0) * height];
    }
  }

  const inside = (x, y, { offsetLeft, offsetTop, offsetWidth, offsetHeight }) =>
    x >= offsetLeft && x < offsetLeft + offsetWidth && y >= offsetTop && y < offsetTop + offsetHeight;

  const within = ([top, left, bottom, right], x, y) => y >= top && y < bottom && x >= left && x < right;

  /** A patch on whole pixels of the screen, without its last row and column where patches are to look apart. */
  function patch([top, left, bottom, right], width, height, scale, joined) {
    const snap = (value) => Math.round(value * scale) / scale;
    const [x, y, x1, y1] = [snap(left * width), snap(top * height), snap(right * width), snap(bottom * height)];
    const gap = joined || x1 - x < GAP_FROM ? 0 : 1;
    return [x, y, x1 - x - gap, y1 - y - gap];
  }

  /** Sound by the second: the waveform with what is kept lit, and a strip of its tokens below. */
  class SoundView {
    constructor(data, index, tokens) {
      const item = data.inspection.items[index];
      this.tokens = tokens;
      this.wave = item.waveform;
      this.groups = groupsBySecond(data, tokens);
      const last = this.groups[this.groups.length - 1];
      this.end = Math.max(item.seconds || 0, this.wave ? this.wave.start + this.wave.seconds : 0, last.end) || 1;
      this.groupOf = new Map(this.groups.flatMap((group) => group.tokens.map((token) => [token, group])));
      this.canvas = make("canvas");
      const plot = make("div", { name: `fv-sound${this.wave ? "" : " fv-silent"}`, children: [this.canvas] });
      this.element = make("div", { name: "fv-time", children: [plot, this._axis()] });
      this.strip = this.wave ? 9 : 22;
      this.loudest = this.wave ? Math.max(1e-3, ...this.wave.high, ...this.wave.low.map((low) => -low)) : 1;
      this.binGroups = this.wave ? this.wave.low.map((_, bin) => this._groupsOfBin(bin)) : [];
    }

    _axis() {
      const ticks = [0, 0.25, 0.5, 0.75, 1].map((at) => make("span", { text: moment(at * this.end) }));
      return make("div", { name: "fv-axis", "aria-hidden": "true", children: ticks });
    }

    _groupsOfBin(bin) {
      const length = this.wave.seconds / this.wave.low.length;
      const start = this.wave.start + bin * length;
      const found = this.groups.filter((group) => group.start < start + length && group.end > start);
      return found.length ? found : null;
    }

    draw(states, colours, changed) {
      if (changed && !this.tokens.some((token) => changed[token])) return;
      const { context, width, height } = prepare(this.canvas);
      for (const group of this.groups) group.share = shareOf(group.tokens, states);
      if (this.wave) this._drawWave(context, width, height - this.strip - 6, colours);
      this._drawStrip(context, width, height, colours);
    }

    _drawWave(context, width, height, colours) {
      const { low, high, start, seconds: length } = this.wave;
      const step = (length / low.length / this.end) * width;
      const draw = (bin, colour, alpha) => {
        const x = (start / this.end) * width + bin * step;
        const top = (1 - high[bin] / this.loudest) * (height / 2),
          bottom = (1 - low[bin] / this.loudest) * (height / 2);
        context.globalAlpha = alpha;
        context.fillStyle = colour;
        context.fillRect(x, Math.min(top, height / 2 - 0.5), Math.max(step * 0.8, 0.6), Math.max(bottom - top, 1));
      };
      for (let bin = 0; bin < low.length; bin++) {
        const groups = this.binGroups[bin];
        const lit = groups ? groups.reduce((sum, group) => sum + group.share, 0) / groups.length : 0;
        if (lit < 1) draw(bin, colours.hatch, 1);
        if (lit > 0) draw(bin, colours.audio, Math.max(lit, 0.25));
      }
      context.globalAlpha = 1;
    }

    _drawStrip(context, width, height, colours) {
      for (const group of this.groups) {
        const x = (group.start / this.end) * width,
          wide = ((group.end - group.start) / this.end) * width;
        const gap = wide > GAP_FROM ? 1 : 0;
        context.globalAlpha = 1;
        context.fillStyle = colours.off;
        context.fillRect(x, height - this.strip, wide - gap, this.strip);
        context.globalAlpha = group.share;
        const rank = colours.heat ? Math.max(...group.tokens.map((token) => colours.heat[token])) : NaN;
        context.fillStyle = Number.isNaN(rank) ? colours.audio : heatColour(rank);
        context.fillRect(x, height - this.strip, wide - gap, this.strip);
      }
      context.globalAlpha = 1;
    }

    at(x, y) {
      if (y > this.canvas.clientHeight) return -1;
      const second = (x / this.canvas.clientWidth) * this.end;
      const group = this.groups.find(({ start, end }) => second >= start && second < end);
      return group ? group.tokens[0] : -1;
    }

    place(token) {
      const { start, end } = this.groupOf.get(token);
      const width = this.canvas.clientWidth;
      return [(start / this.end) * width, 0, Math.max(((end - start) / this.end) * width, 2), this.canvas.clientHeight];
    }
  }

  /** Tokens of the same second together; each group lasts until the next, the last one as long as most do. */
  function groupsBySecond(data, tokens) {
    const bySecond = new Map();
    for (const token of tokens) {
      const second = data.second[token];
      if (!bySecond.has(second)) bySecond.set(second, []);
      bySecond.get(second).push(token);
    }
    const starts = [...bySecond.keys()].sort((a, b) => a - b);
    const steps = starts
      .slice(1)
      .map((start, i) => start - starts[i])
      .sort((a, b) => a - b);
    const usual = steps.length ? steps[steps.length >> 1] : 1;
    return starts.map((start, i) => ({
      start,
      end: Math.min(i + 1 < starts.length ? starts[i + 1] : start + usual, start + 2 * usual),
      tokens: bySecond.get(start),
      share: 0,
    }));
  }

  /** Tokens that have no place in a picture or in time: one cell each, in prompt order. */
  class SlotsView {
    constructor(data, tokens) {
      this.tokens = tokens;
      this.index = new Map(tokens.map((token, i) => [token, i]));
      this.data = data;
      this.canvas = make("canvas");
      this.element = make("div", { name: "fv-slots", children: [this.canvas] });
      this.cell = tokens.length > 1200 ? 6 : tokens.length > 300 ? 8 : 12;
    }

    _columns() {
      return Math.max(1, Math.floor(this.element.clientWidth / this.cell));
    }

    draw(states, colours, changed) {
      if (changed && !this.tokens.some((token) => changed[token])) return;
      const columns = this._columns();
      this.canvas.style.height = `${Math.ceil(this.tokens.length / columns) * this.cell}px`;
      const { context } = prepare(this.canvas);
      this.tokens.forEach((token, i) => {
        const x = (i % columns) * this.cell,
          y = Math.floor(i / columns) * this.cell;
        context.globalAlpha = states[token] === UNCACHED ? 0.4 : 1;
        const rank = colours.heat ? colours.heat[token] : NaN;
        const lit = Number.isNaN(rank) ? colours[this.data.name(token)] : heatColour(rank);
        context.fillStyle = states[token] === DROPPED ? colours.off : lit;
        context.fillRect(x, y, this.cell - 1, this.cell - 1);
      });
      context.globalAlpha = 1;
    }

    at(x, y) {
      const column = Math.floor(x / this.cell),
        columns = this._columns();
      if (column >= columns) return -1;
      return this.tokens[Math.floor(y / this.cell) * columns + column] ?? -1;
    }

    place(token) {
      const i = this.index.get(token),
        columns = this._columns();
      return [(i % columns) * this.cell, Math.floor(i / columns) * this.cell, this.cell - 1, this.cell - 1];
    }
  }

  /** The text of the prompt as chips, with marks where media tokens are between them. */
  class TextView {
    constructor(data, tokens) {
      this.tokens = tokens;
      this.chips = new Map();
      this.element = make("p", { name: "fv-texts" });
      let previous = -1;
      for (const token of tokens) {
        if (token > previous + 1) this.element.append(mediaMark(data, previous + 1, token));
        this.element.append(this._chip(data, token));
        previous = token;
      }
      if (previous + 1 < data.size) this.element.append(mediaMark(data, previous + 1, data.size));
    }

    _chip(data, token) {
      const text = data.text[token] || "";
      const chip = make("span", { name: "fv-chip", text: visible(text) || "␣" });
      if (/^\s/.test(text)) chip.classList.add("fv-word");
      if (/^\s*$/.test(text) || /^\s*<.*>\s*$/.test(text)) chip.classList.add("fv-special");
      chip.dataset.token = token;
      this.chips.set(token, chip);
      return chip;
    }

    draw(states, colours, changed) {
      for (const [token, chip] of this.chips) {
        if (changed && !changed[token]) continue;
        chip.classList.toggle("fv-out", states[token] === DROPPED);
        chip.classList.toggle("fv-uncached", states[token] === UNCACHED);
      }
    }

    at(x, y) {
      for (const [token, chip] of this.chips) if (inside(x, y + this.element.scrollTop, chip)) return token;
      return -1;
    }

    place(token) {
      const { offsetLeft, offsetTop, offsetWidth, offsetHeight } = this.chips.get(token);
      return [offsetLeft, offsetTop - this.element.scrollTop, offsetWidth, offsetHeight];
    }

    reveal(token) {
      const chip = this.chips.get(token),
        { element } = this;
      if (chip.offsetTop < element.scrollTop) element.scrollTop = chip.offsetTop;
      const below = chip.offsetTop + chip.offsetHeight - element.scrollTop - element.clientHeight;
      if (below > 0) element.scrollTop += below;
    }
  }

  /** A mark in the text for the media tokens from `start` to before `end`. */
  function mediaMark(data, start, end) {
    const counts = new Map();
    for (let token = start; token < end; token++) counts.set(data.name(token), (counts.get(data.name(token)) || 0) + 1);
    const parts = [...counts].flatMap(([name, n]) => [swatch(name), make("span", { text: `${count(n)} ${name}` })]);
    return make("span", { name: "fv-mark", children: parts });
  }

  // ---------------------------------------------------------------- pointing at tokens

  /** Hovering, touching and the arrow keys inside one view. */
  class Pointing {
    constructor(viewer, view, label) {
      this.viewer = viewer;
      this.view = view;
      this.current = -1;
      this.mark = make("div", { name: "fv-target", hidden: "" });
      this.element = make("div", {
        name: "fv-view",
        tabindex: "0",
        role: "group",
        "aria-label": `${label}. Arrow keys visit the tokens.`,
        children: [view.element, this.mark],
      });
      this.element.addEventListener("pointermove", (event) => this._hover(event));
      this.element.addEventListener("pointerdown", (event) => this._hover(event));
      this.element.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.hide());
      this.element.addEventListener(
        "focus",
        () => this.element.matches(":focus-visible") && this.show(Math.max(this.current, this.view.tokens[0]), true),
      );
      this.element.addEventListener("blur", () => this.hide());
      this.element.addEventListener("keydown", (event) => this._key(event));
    }

    _hover(event) {
      const bounds = this.element.getBoundingClientRect();
      const token = this.view.at(event.clientX - bounds.left, event.clientY - bounds.top);
      if (token < 0) this.hide();
      else this.show(token, false);
    }

    _key(event) {
      const token = this._next(event.key);
      if (event.key === "Escape") this.hide();
      if (token === null) return;
      event.preventDefault();
      this.show(token, true);
    }

    _next(key) {
      const { tokens } = this.view;
      const at = Math.max(0, tokens.indexOf(this.current));
      if (key === "ArrowRight") return tokens[Math.min(at + 1, tokens.length - 1)];
      if (key === "ArrowLeft") return tokens[Math.max(at - 1, 0)];
      if (key === "Home") return tokens[0];
      if (key === "End") return tokens[tokens.length - 1];
      if (key === "ArrowDown" || key === "ArrowUp") return this._nextRow(tokens[at], key === "ArrowDown" ? 1 : -1);
      return null;
    }

    /** The token of the row below or above that is nearest. */
    _nextRow(token, direction) {
      const centre = ([left, top, width, height]) => [left + width / 2, top + height / 2];
      const [x, y] = centre(this.view.place(token));
      let best = token,
        least = Infinity;
      for (const other of this.view.tokens) {
        const [otherX, otherY] = centre(this.view.place(other));
        const away = (otherY - y) * direction;
        const cost = away + 2 * Math.abs(otherX - x);
        if (away > 1 && cost < least) [best, least] = [other, cost];
      }
      return best;
    }

    show(token, speak) {
      this.current = token;
      if (speak && this.view.reveal) this.view.reveal(token);
      const [left, top, width, height] = this.view.place(token);
      Object.assign(this.mark.style, {
        left: `${left - 1}px`,
        top: `${top - 1}px`,
        width: `${width + 2}px`,
        height: `${height + 2}px`,
      });
      this.mark.hidden = false;
      this.viewer.explain(this, token, [left, top, width, height], speak);
    }

    hide() {
      this.mark.hidden = true;
      this.viewer.explain(this, -1);
    }
  }

  // ---------------------------------------------------------------- the bars per layer, with slider and play button

  class LayerBars {
    constructor(data, onLayer) {
      this.data = data;
      this.onLayer = onLayer;
      this.highest = Math.max(1, data.size);
      this.columns = data.perLayer.map((row, layer) => this._column(row, layer));
      this.bars = make("div", { name: "fv-columns", "aria-hidden": "true", children: this.columns });
      this.bars.addEventListener("click", (event) => {
        const column = event.target.closest(".fv-column");
        if (column) onLayer(this.columns.indexOf(column));
      });
      this.slider = make("input", {
        type: "range",
        min: "0",
        max: String(data.layers - 1),
        step: "1",
        "aria-label": "Layer",
      });
      this.slider.addEventListener("input", () => onLayer(Number(this.slider.value)));
      const scale = make("div", {
        name: "fv-scale",
        "aria-hidden": "true",
        text: `tokens per layer, of ${count(data.size)} in the prompt`,
      });
      this.element = make("div", { name: "fv-bars", children: [scale, this.bars, this.slider, this._ticks()] });
      this.element.style.setProperty("--fv-layers", data.layers);
    }

    _column(row, layer) {
      const parts = [];
      ORDER.forEach((name) => {
        const modality = this.data.names.indexOf(name);
        if (modality < 0 || !row.runs[modality]) return;
        const cached = row.cached[modality],
          uncached = row.runs[modality] - cached;
        if (cached) parts.push(this._part(name, cached, ""));
        if (uncached) parts.push(this._part(name, uncached, " fv-pale"));
      });
      return make("div", {
        name: "fv-column",
        title: `layer ${layer}: ${plural(row.total, "token")}`,
        children: parts,
      });
    }

    _part(name, n, suffix) {
      const part = make("i", { name: `fv-${name}${suffix}` });
      part.style.height = `${(n / this.highest) * 100}%`;
      return part;
    }

    _ticks() {
      const { layers } = this.data;
      const every = [1, 2, 4, 5, 8, 10, 16, 20].find((step) => layers / step <= 9) || 25;
      const ticks = [];
      for (let layer = 0; layer < layers; layer += every) {
        const tick = make("span", { text: String(layer) });
        tick.style.left = `${((layer + 0.5) / layers) * 100}%`;
        ticks.push(tick);
      }
      return make("div", { name: "fv-ticks", "aria-hidden": "true", children: ticks });
    }

    set(layer, text) {
      this.columns.forEach((column, i) => column.classList.toggle("fv-now", i === layer));
      this.slider.value = String(layer);
      this.slider.setAttribute("aria-valuetext", text);
    }
  }

  /** Cuts as runs of consecutive layers with one method: [{first, last, method, cacheOnly}]. */
  function runsOf(cuts) {
    const runs = [];
    for (const { layer, method, cache_only: cacheOnly } of cuts) {
      const run = runs[runs.length - 1];
      if (run && run.method === method && run.cacheOnly === cacheOnly && layer - run.last <= 1) run.last = layer;
      else runs.push({ first: layer, last: layer, method, cacheOnly });
    }
    return runs;
  }

  // ---------------------------------------------------------------- the viewer

  class Viewer {
    constructor(parent, inspection, options) {
      this.data = new Tokens(inspection);
      this.options = options;
      this.layer = -1;
      this.timer = null;
      this.states = null;
      this.views = [];
      this.element = make("div", { name: "fv", role: "group", "aria-label": this._label() });
      this.bars = new LayerBars(this.data, (layer) => {
        this.pause();
        this.setLayer(layer);
      });
      this.tip = make("div", { name: "fv-tip", hidden: "", "aria-hidden": "true" });
      this.spoken = make("div", { name: "fv-unseen", role: "status", "aria-live": "polite" });
      this.element.append(
        this._head(),
        this.bars.element,
        this._cuts(),
        this._legend(),
        ...this._stage(),
        this._table(),
        this.tip,
        this.spoken,
      );
      parent.replaceChildren(this.element);
      this._watch();
      const start = options.autoplay && !reducedMotion() ? 0 : (options.layer ?? this.data.layers - 1);
      this.setLayer(start);
      if (options.autoplay && !reducedMotion()) this._playWhenSeen();
    }

    _label() {
      const { plan, question } = this.data.inspection;
      const last = this.data.perLayer[this.data.layers - 1];
      return (
        `What plan ${plan} kept of ${plural(this.data.size, "token")}: ${count(last.total)} in the last of ${plural(this.data.layers, "layer")}.` +
        (question ? ` Question: ${question}` : "")
      );
    }

    _head() {
      this.playButton = make("button", {
        type: "button",
        name: "fv-play",
        "aria-label": "Play from the first layer to the last",
      });
      this.playButton.addEventListener("click", () => (this.timer === null ? this.play() : this.pause()));
      this.headline = make("div", { name: "fv-headline" });
      const title = make("div", { name: "fv-title", children: [this.headline] });
      if (this.options.title) title.prepend(make("div", { name: "fv-name", text: this.options.title }));
      return make("div", { name: "fv-head", children: [this.playButton, title] });
    }

    _cuts() {
      const runs = runsOf(this.data.cuts);
      const list = make("div", { name: "fv-cuts" });
      if (!runs.length)
        list.append(make("span", { name: "fv-soft", text: "This plan has no cuts: every layer runs on every token." }));
      for (const { first, last, method, cacheOnly } of runs) {
        const where = first === last ? `layer ${first}` : `layers ${first}–${last}`;
        const button = make("button", {
          type: "button",
          children: [make("b", { text: method }), ` ${where}${cacheOnly ? ", cache only" : ""}`],
        });
        button.addEventListener("click", () => this.bars.onLayer(Math.min(first, this.data.layers - 1)));
        list.append(button);
      }
      return list;
    }

    _legend() {
      this.legendValues = new Map();
      const totals = new Array(this.data.names.length).fill(0);
      for (const modality of this.data.modality) totals[modality] += 1;
      const entries = ORDER.filter((name) => totals[this.data.names.indexOf(name)]).map((name) => {
        const modality = this.data.names.indexOf(name),
          value = make("b");
        this.legendValues.set(modality, value);
        return make("li", {
          children: [
            swatch(name),
            make("span", { text: name }),
            value,
            make("small", { text: `of ${count(totals[modality])}` }),
          ],
        });
      });
      entries.push(
        make("li", {
          name: "fv-key",
          children: [
            make("i", { name: "fv-swatch fv-offkey", "aria-hidden": "true" }),
            make("span", { text: "dropped" }),
          ],
        }),
      );
      if (this.data.cuts.some((cut) => cut.cache_only)) {
        entries.push(
          make("li", {
            name: "fv-key",
            children: [
              make("i", { name: "fv-swatch fv-palekey", "aria-hidden": "true" }),
              make("span", { text: "runs, but is not in this layer’s cache" }),
            ],
          }),
        );
      }
      const row = make("div", {
        name: "fv-legendrow",
        children: [make("ul", { name: "fv-legend", children: entries })],
      });
      if (this.data.hasScores) row.append(this._scoreSwitch());
      return row;
    }

    /** The switch between the picture and the scores of what is kept. */
    _scoreSwitch() {
      this.scores = make("input", { type: "checkbox" });
      this.scores.addEventListener("change", () => this.redraw());
      const scale = make("span", { name: "fv-heat", "aria-hidden": "true" });
      scale.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(heatColour).join(", ")})`;
      return make("label", {
        name: "fv-scores",
        title: "Ranks by the scores of the next cut, from the lowest to the highest",
        children: [this.scores, "colour by score", scale],
      });
    }

    _colours() {
      const heat = this.scores && this.scores.checked ? this.data.heat(this.layer) : null;
      return { ...palette(this.element), heat };
    }

    /** A section for each item and one for the text. */
    _stage() {
      const { data } = this,
        sections = [];
      data.inspection.items.forEach((item, index) => {
        const mine = data.where((token) => data.item[token] === index);
        const frames = new Set(item.frames.map((frame) => frame.frame));
        const seen = mine.filter((token) => data.name(token) !== "audio" && frames.has(data.frame[token]));
        const heard = mine.filter((token) => data.name(token) === "audio" && typeof data.second[token] === "number");
        const placed = new Set([...seen, ...heard]);
        const parts = [];
        if (seen.length)
          parts.push(
            this._view(
              new FramesView(data, index, seen),
              "",
              `${plural(item.frames.length, item.kind === "image" ? "picture" : "frame")} of ${item.name}`,
            ),
          );
        if (heard.length)
          parts.push(
            this._view(new SoundView(data, index, heard), seen.length ? "Sound" : "", `sound of ${item.name}`),
          );
        parts.push(
          ...this._slots(
            mine.filter((token) => !placed.has(token)),
            item,
          ),
        );
        if (parts.length)
          sections.push(make("section", { name: "fv-item", children: [this._itemHead(item), ...parts] }));
      });
      const text = data.where((token) => data.item[token] < 0 || data.name(token) === "text");
      if (text.length)
        sections.push(
          make("section", {
            name: "fv-item",
            children: [this._view(new TextView(data, text), "Prompt", "text of the prompt")],
          }),
        );
      return sections;
    }

    /** Views of the tokens that have no place in a picture or in time, by modality and by why. */
    _slots(tokens, item) {
      const byWhy = new Map();
      for (const token of tokens) {
        const name = this.data.name(token);
        if (!MEDIA.includes(name)) continue;
        const why = this.data.padding[token] ? "padding" : name === "audio" ? "seconds unknown" : "not of one frame";
        const key = `${name}, ${why}`;
        if (!byWhy.has(key)) byWhy.set(key, { name, why, tokens: [] });
        byWhy.get(key).tokens.push(token);
      }
      return [...byWhy.values()].map(({ name, why, tokens: some }) => {
        const heading = `${plural(some.length, `${name} token`)}, ${why}`;
        return this._view(new SlotsView(this.data, some), heading, `${heading}, of ${item.name}`);
      });
    }

    _itemHead(item) {
      const facts = [item.kind];
      if (typeof item.seconds === "number") facts.push(moment(item.seconds));
      if (item.kind === "video" && item.frames.length) facts.push(plural(item.frames.length, "sampled frame"));
      return make("h3", {
        name: "fv-itemhead",
        children: [make("b", { text: item.name || item.kind }), make("span", { text: facts.join(" · ") })],
      });
    }

    _view(view, heading, label) {
      const pointing = new Pointing(this, view, label);
      this.views.push({ view, pointing });
      const children = heading
        ? [make("div", { name: "fv-subhead", text: heading }), pointing.element]
        : [pointing.element];
      return make("div", { name: "fv-part", children });
    }

    /** The numbers of the bars as a table, which also reads well aloud. */
    _table() {
      const { data } = this;
      const names = data.names.filter((_, modality) => this.legendValues.has(modality));
      const cell = (tag, text, scope) => make(tag, { text, scope });
      const head = make("tr", {
        children: [
          cell("th", "layer", "col"),
          ...names.map((name) => cell("th", name, "col")),
          cell("th", "all", "col"),
          cell("th", "cut before it", "col"),
        ],
      });
      const fill = (body) =>
        data.perLayer.forEach((row, layer) => {
          const cuts = data.cuts
            .filter((cut) => cut.layer === layer)
            .map((cut) => cut.method + (cut.cache_only ? " (cache only)" : ""));
          body.append(
            make("tr", {
              children: [
                cell("th", String(layer), "row"),
                ...names.map((name) => cell("td", count(row.runs[data.names.indexOf(name)]))),
                cell("td", count(row.total)),
                cell("td", cuts.join(", ")),
              ],
            }),
          );
        });
      const body = make("tbody");
      const table = make("table", { children: [make("thead", { children: [head] }), body] });
      const details = make("details", {
        name: "fv-table",
        children: [
          make("summary", { text: "Tokens per layer as a table" }),
          make("div", {
            name: "fv-scroll",
            tabindex: "0",
            role: "region",
            "aria-label": "Tokens per layer",
            children: [table],
          }),
        ],
      });
      details.addEventListener("toggle", () => body.childElementCount || fill(body));
      return details;
    }

    /** Draw again when the width or the theme changes. */
    _watch() {
      let width = 0;
      this.resizes = new ResizeObserver(() => {
        if (this.element.clientWidth === width) return;
        width = this.element.clientWidth;
        this.redraw();
      });
      this.resizes.observe(this.element);
      this.scheme = matchMedia("(prefers-color-scheme: dark)");
      this.onTheme = () => this.redraw();
      this.scheme.addEventListener("change", this.onTheme);
      this.themes = new MutationObserver(this.onTheme);
      this.themes.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    }

    redraw() {
      if (!this.states) return;
      const colours = this._colours();
      for (const { view, pointing } of this.views) {
        pointing.hide();
        view.draw(this.states, colours, null);
      }
    }

    sentence() {
      const row = this.data.perLayer[this.layer];
      const cache = row.cachedTotal < row.total ? `, ${count(row.cachedTotal)} in its KV cache` : "";
      return `layer ${this.layer}: ${count(row.total)} of ${plural(this.data.size, "token")} remain${cache}`;
    }

    setLayer(layer) {
      layer = Math.min(Math.max(Math.round(layer), 0), this.data.layers - 1);
      if (layer === this.layer) return;
      const before = this.states;
      this.layer = layer;
      this.states = this.data.states(layer);
      const colours = this._colours();
      // scores are of another cut at every layer, so that all is drawn again
      const changed =
        before && !colours.heat ? this.states.map((state, token) => (state !== before[token] ? 1 : 0)) : null;
      for (const { view } of this.views) view.draw(this.states, colours, changed);
      this._tell();
      this.element.dispatchEvent(new CustomEvent("fastav:layer", { bubbles: true, detail: { layer } }));
    }

    _tell() {
      const row = this.data.perLayer[this.layer],
        sentence = this.sentence();
      this.bars.set(this.layer, sentence);
      const cache = row.cachedTotal < row.total ? ` · ${count(row.cachedTotal)} in its KV cache` : "";
      this.headline.replaceChildren(
        make("span", { name: "fv-layer", text: `layer ${this.layer}` }),
        make("b", { text: count(row.total) }),
        make("span", { text: ` of ${plural(this.data.size, "token")} remain${cache}` }),
        make("em", { text: share(row.cachedTotal / Math.max(1, this.data.size)) }),
      );
      for (const [modality, value] of this.legendValues) value.textContent = count(row.cached[modality]);
      if (this.timer === null) this.spoken.textContent = sentence; // a layer every few moments would drown a reader
    }

    /** Show what is known of a token beside it, or hide that. */
    explain(pointing, token, place, speak) {
      this.tip.hidden = token < 0;
      if (token < 0) return;
      const { title, detail, lines } = this.data.describe(token, this.layer);
      this.tip.replaceChildren(
        make("b", { text: title }),
        make("span", { text: detail }),
        ...lines.map((line) => make("div", { text: line })),
      );
      this._placeTip(pointing.element, place);
      if (speak) this.spoken.textContent = [title, detail, ...lines].join(", ");
    }

    _placeTip(element, [left, top, width, height]) {
      const origin = this.element.getBoundingClientRect(),
        bounds = element.getBoundingClientRect();
      const x = bounds.left - origin.left + left + width / 2,
        y = bounds.top - origin.top + top;
      const half = this.tip.offsetWidth / 2;
      const above = bounds.top + top > this.tip.offsetHeight + 12;
      this.tip.style.left = `${Math.min(Math.max(x, half + 2), Math.max(half + 2, this.element.clientWidth - half - 2)) - half}px`;
      this.tip.style.top = `${above ? y - this.tip.offsetHeight - 8 : y + height + 8}px`;
    }

    play() {
      if (this.layer >= this.data.layers - 1) this.setLayer(0);
      this.element.classList.add("fv-playing");
      this.playButton.setAttribute("aria-label", "Pause");
      const usual = Math.min(Math.max((PLAY_SECONDS * 1000) / this.data.layers, 60), 450);
      const firsts = new Set(runsOf(this.data.cuts).map((run) => run.first));
      const step = () => {
        this.setLayer(this.layer + 1);
        if (this.layer >= this.data.layers - 1) this.pause();
        else this.timer = setTimeout(step, firsts.has(this.layer) ? Math.max(2 * usual, 500) : usual); // where a method begins, time to look
      };
      this.timer = setTimeout(step, 600);
    }

    pause() {
      if (this.timer === null) return;
      clearTimeout(this.timer);
      this.timer = null;
      this.element.classList.remove("fv-playing");
      this.playButton.setAttribute("aria-label", "Play from the first layer to the last");
      this.spoken.textContent = this.sentence();
    }

    /** Play once, when the viewer comes into sight, unless a layer was chosen before. */
    _playWhenSeen() {
      this.sight = new IntersectionObserver(
        (entries) => {
          if (!entries.some((entry) => entry.isIntersecting)) return;
          this.sight.disconnect();
          if (this.layer === 0) this.play();
        },
        { threshold: 0.2 },
      );
      this.sight.observe(this.bars.element);
    }

    destroy() {
      this.pause();
      this.resizes.disconnect();
      this.themes.disconnect();
      if (this.sight) this.sight.disconnect();
      this.scheme.removeEventListener("change", this.onTheme);
      this.element.remove();
    }
  }

  /** Draw an inspection into an element, whose content it replaces.
   *
   * options: `layer` (the first to show; default the last), `autoplay` (play once when in sight, unless the reader
   * prefers reduced motion), `title` (a line above).
   * Returns {element, layer, layers, setLayer, play, pause, destroy}. The element sends "fastav:layer" events.
   */
  function mount(element, inspection, options = {}) {
    if (inspection.schema !== 1) throw new Error(`This page reads inspections of schema 1, not ${inspection.schema}.`);
    const viewer = new Viewer(element, inspection, options);
    return {
      element: viewer.element,
      get layer() {
        return viewer.layer;
      },
      layers: viewer.data.layers,
      setLayer: (layer) => viewer.setLayer(layer),
      play: () => viewer.play(),
      pause: () => viewer.pause(),
      destroy: () => viewer.destroy(),
    };
  }

  // ---------------------------------------------------------------- what a run cost

  const PHASES = ["queue", "media", "encode", "prefill", "decode"];
  const total = (numbers) => Object.values(numbers || {}).reduce((a, b) => a + b, 0);

  /** The seconds that a run worked, without its wait for other requests; null if they were not measured. */
  function workSeconds(usage) {
    if (!usage || !usage.seconds) return null;
    return PHASES.slice(1).reduce((sum, phase) => sum + (usage.seconds[phase] || 0), 0);
  }

  function costRow(name, value, note, bar) {
    return make("div", {
      name: "fv-cost",
      children: [
        make("span", { name: "fv-costname", text: name }),
        make("b", { text: value }),
        make("span", { name: "fv-costnote", text: note }),
        bar,
      ],
    });
  }

  function ratioBar(ratio) {
    const part = make("i", { name: "fv-ratio" });
    part.style.width = `${Math.min(1, ratio) * 100}%`;
    return make("div", { name: "fv-costbar", "aria-hidden": "true", children: [part] });
  }

  function phaseBar(usage, longest) {
    const shown = PHASES.slice(1).filter((phase) => usage.seconds[phase] > 0);
    const parts = shown.map((phase) => {
      const part = make("i", { name: `fv-phase fv-${phase}`, title: `${phase} ${seconds(usage.seconds[phase])}` });
      part.style.width = `${(usage.seconds[phase] / longest) * 100}%`;
      return part;
    });
    return make("div", { name: "fv-costbar", "aria-hidden": "true", children: parts });
  }

  /** The seconds of each phase, as a legend of the bar. */
  function phaseList(usage, generated) {
    const names = {
      queue: "queue, not counted ",
      decode: generated === undefined ? "decode " : `decode ${plural(generated, "token")} `,
    };
    const shown = PHASES.filter(
      (phase) => usage.seconds[phase] > 0 && (phase !== "queue" || usage.seconds.queue >= 0.01),
    );
    return make("ul", {
      name: "fv-phases",
      children: shown.map((phase) =>
        make("li", {
          children: [
            make("i", { name: `fv-swatch fv-${phase}`, "aria-hidden": "true" }),
            names[phase] || `${phase} `,
            make("b", { text: seconds(usage.seconds[phase]) }),
          ],
        }),
      ),
    });
  }

  /** Time, FLOPs, KV cache and tokens of a run, as an element.
   *
   * usage: `usage.fastav` of an answer, or an inspection where nothing was measured. longest: the seconds that a bar of
   * full width stands for. generated: the number of tokens of the answer, if known.
   */
  function costs(usage, { longest, generated } = {}) {
    const rows = [],
      work = workSeconds(usage);
    if (work !== null) {
      rows.push(costRow("time", seconds(work), "", phaseBar(usage, longest || work || 1)), phaseList(usage, generated));
    }
    const row = (name, amount, format) => {
      const [value, full] = [format(amount.pruned), format(amount.full)];
      const unit = full.slice(full.indexOf(" "));
      const whole = value.endsWith(unit) ? full.slice(0, -unit.length) : full; // the unit once is enough
      rows.push(costRow(name, value, `${share(amount.ratio)} of ${whole}`, ratioBar(amount.ratio)));
    };
    if (usage.flops) row("prefill", usage.flops, flops);
    if (usage.kv_bytes) row("KV cache", usage.kv_bytes, bytes);
    const perLayer = usage.tokens_per_layer;
    if (perLayer && perLayer.length) {
      const prompt = total(usage.prompt_tokens),
        last = total(perLayer[perLayer.length - 1]);
      rows.push(
        costRow("tokens", count(prompt), `${count(last)} in the last layer`, ratioBar(prompt ? last / prompt : 1)),
      );
    }
    return make("div", { name: "fv-costs", children: rows });
  }

  return {
    mount,
    costs,
    workSeconds,
    compareTexts,
    writeWords,
    format: { count, plural, flops, bytes, seconds, moment, share },
  };
})();
