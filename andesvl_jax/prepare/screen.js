// What the window shows: the widgets that can be tapped and where, and every visible text. The value is JSON-like.
(() => {
  const WIDGETS = "a, button, input, select, textarea, [role=button], [role=tab], [role=checkbox]";
  const TYPED = ["text", "email", "search", "tel", "url", "number", "password"]; // inputs that show what is typed into them
  const SMALLEST = 8; // pixels either way
  const clean = text => (text || "").replace(/\s+/g, " ").trim();
  const visible = node => node.checkVisibility({ opacityProperty: true, visibilityProperty: true });

  // input elements that carry their own text show it only if it is as wide as the room for it
  const fits = (node, text) => {
    const style = getComputedStyle(node);
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = style.font;
    return pen.measureText(text).width <= node.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  };

  // [kind, text, whether the text is to be seen]
  const describe = node => {
    const type = (node.getAttribute("type") || "text").toLowerCase();
    const hidden = clean(node.getAttribute("aria-label") || node.getAttribute("title"));
    if (node.tagName === "SELECT") return ["select", clean(node.selectedOptions[0]?.text), true];
    if (node.tagName === "INPUT" && ["checkbox", "radio"].includes(type)) return ["checkbox", clean(node.labels?.[0]?.innerText), true];
    if (node.tagName === "INPUT" && ["submit", "button", "reset"].includes(type)) return ["button", clean(node.value), true];
    if (node.tagName === "INPUT" && !TYPED.includes(type)) return ["button", hidden, false];
    if (["INPUT", "TEXTAREA"].includes(node.tagName)) {
      const secret = type === "password" && node.value;
      const text = secret ? "" : clean(node.value || node.placeholder);
      return text ? ["field", fits(node, text) ? text : "", true] : ["field", hidden, false];
    }
    const kind = node.tagName === "A" && !node.matches("[role=button], .btn, [href='#'], [href='#!'], [href^='javascript']") ? "link" : "button";
    const text = clean(node.innerText);
    if (text && node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).overflow === "hidden") return [kind, "", true];
    return text ? [kind, text, true] : [kind, hidden, false];
  };

  // a checkbox is tapped on its label too
  const outline = (node, kind) => {
    const rects = [node, ...(kind === "checkbox" ? node.labels : [])].map(part => part.getBoundingClientRect());
    const edge = (name, pick) => pick(...rects.map(rect => rect[name]));
    return [edge("left", Math.min), edge("top", Math.min), edge("right", Math.max), edge("bottom", Math.max)];
  };

  const uncovered = (node, [left, top, right, bottom]) => {
    const x = (left + right) / 2, y = (top + bottom) / 2;
    const points = [[x, y], [left + 3, y], [right - 3, y], [x, top + 2], [x, bottom - 2]];
    const own = found => found && (node.contains(found) || [...(node.labels || [])].some(label => label.contains(found)));
    return points.every(point => own(document.elementFromPoint(...point)));
  };

  const smallestText = node => {
    const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
    let size = Infinity;
    while (walker.nextNode()) {
      const owner = walker.currentNode.parentElement;
      if (clean(walker.currentNode.data) && visible(owner)) size = Math.min(size, parseFloat(getComputedStyle(owner).fontSize));
    }
    return size === Infinity ? parseFloat(getComputedStyle(node).fontSize) : size;
  };

  const widgets = [];
  for (const node of document.querySelectorAll(WIDGETS)) {
    if (!visible(node) || node.parentElement?.closest(WIDGETS)) continue;
    const [kind, text, seen] = describe(node);
    const edges = outline(node, kind);
    const [left, top, right, bottom] = edges;
    if (right - left < SMALLEST || bottom - top < SMALLEST) continue;
    const whole = !node.disabled && left >= 0 && top >= 0 && right <= innerWidth && bottom <= innerHeight && uncovered(node, edges);
    widgets.push({ kind, text, seen, whole, box: edges, size: smallestText(node) });
  }

  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = clean(walker.currentNode.data), owner = walker.currentNode.parentElement;
    if (!text || !owner || owner.closest(WIDGETS) || owner.closest("script, style, noscript, label") || !visible(owner)) continue;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const rect = range.getBoundingClientRect();
    if (rect.bottom > 0 && rect.top < innerHeight && rect.right > 0 && rect.left < innerWidth) texts.push(text);
  }
  return { width: innerWidth, height: innerHeight, bottom: document.documentElement.scrollHeight, widgets, texts };
})()
