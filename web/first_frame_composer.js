/**
 * The canvas of First Frame Composer, inside the node: references are dragged, scaled and put in order.
 *
 * The text widget `boxes` is the truth. The editor reads it, draws it, and writes it; a workflow that is shared carries
 * it as any other value, and the node works the same without this file. Nothing else is stored: pictures come from the
 * nodes before this one, and from its last run.
 */
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import * as layout from "./first_frame_layout.js"

const NODE = "FrameMemoryFirstFrameComposer"
const COLOURS = ["#d8431f", "#1a76d2", "#2e8b3d", "#b86e00", "#8e24aa", "#007c8a"]
/** CSS pixels: the square at a corner, how near a pointer must come, the room around the canvas. */
const HANDLE = 9
const NEAR = 10
const MARGIN = 12
/** The line below the canvas, and the room ComfyUI leaves around a widget. */
const BELOW = 52
/** The text of the boxes: a background and four references. */
const TEXT = 84
/** Milliseconds between looks at what the graph has changed, and how many nodes back a picture is looked for. */
const LOOK = 250
const STEPS_BACK = 4
const MOST_PIXELS = 4096
/** The property of the node that keeps the layout before the first drag. */
const BEFORE = "layout before free boxes"

const STYLE = {
  root: "display:flex;flex-direction:column;gap:4px;width:100%;height:100%;min-height:0;box-sizing:border-box;font:12px sans-serif",
  canvas: "flex:1 1 0;min-height:0;min-width:0;width:100%;border-radius:6px;touch-action:none;outline-offset:-2px;background:var(--comfy-input-bg,#222)",
  line: "flex:none;display:flex;gap:4px;align-items:center;min-width:0",
  said: "flex:1 1 0;min-width:0;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;color:var(--input-text,#ddd)",
  button:
    "flex:none;padding:3px 8px;border:1px solid var(--border-color,#555);border-radius:4px;font:inherit;cursor:pointer;" +
    "background:var(--comfy-input-bg,#222);color:var(--input-text,#ddd)",
}

function made(tag, style, properties = {}) {
  const element = Object.assign(document.createElement(tag), properties)
  element.style.cssText = style
  return element
}

const label = (name) => (name === layout.BACKGROUND ? name : `reference ${name}`)
const numberOf = (name) => (name === layout.BACKGROUND ? 0 : Number(name))

class Editor {
  constructor(node) {
    this.node = node
    this.selected = null
    this.drag = null
    /** By name: {picture, size, source, ran}. source: which output it came from, so that another one replaces it. */
    this.pictures = new Map()
    /** Pictures of Load Image without their transparency, by address. */
    this.whole = new Map()
    this.lastSize = null
    this.least = 0
    this.drawn = ""
    this.element = made("div", STYLE.root, { className: "frame-memory-composer" })
    this.canvas = made("canvas", STYLE.canvas, { tabIndex: 0 })
    this.canvas.setAttribute("role", "application")
    this.canvas.setAttribute(
      "aria-label",
      "Canvas of the first frame. Number keys select a reference, B the background; arrow keys move it, plus and minus " +
        "scale it, square brackets change the order, Delete puts it back.",
    )
    this.said = made("span", STYLE.said)
    this.said.setAttribute("aria-live", "polite")
    this.element.append(this.canvas, this.bar())
    this.listen()
    this.resized = new ResizeObserver(() => this.draw())
    this.timer = null
  }

  /** A node that was made only to be copied is never added to a graph, and never looks. */
  start() {
    this.stop()
    this.resized.observe(this.canvas)
    this.timer = setInterval(() => this.look(), LOOK)
  }

  stop() {
    clearInterval(this.timer)
    this.resized.disconnect()
  }

  bar() {
    const bar = made("div", STYLE.line)
    const buttons = [
      ["Forward", "Draw the selected picture later, over others (key ])", () => this.reorder(1)],
      ["Back", "Draw the selected picture earlier, under others (key [)", () => this.reorder(-1)],
      ["Reset", "The selected picture back to its usual place (Delete); with none selected: all of them", () => this.reset()],
    ]
    bar.append(this.said)
    for (const [textContent, title, onclick] of buttons) {
      bar.append(made("button", STYLE.button, { type: "button", textContent, title, onclick }))
    }
    return bar
  }

  // The node's widgets.

  widget(name) {
    return this.node.widgets?.find((widget) => widget.name === name)
  }

  value(name, fallback) {
    return this.widget(name)?.value ?? fallback
  }

  set(name, value) {
    const widget = this.widget(name)
    if (!widget || widget.value === value) return
    widget.value = value
    widget.callback?.(value, app.canvas, this.node)
  }

  /** Whether a widget's value comes through a link, so that what the widget holds means nothing. */
  linked(name) {
    return (this.node.inputs ?? []).some((input) => input.widget?.name === name && input.link != null)
  }

  get locked() {
    return this.linked("boxes") || this.linked("layout")
  }

  get size() {
    const widget = [Number(this.value("width", 1280)), Number(this.value("height", 720))]
    const size = this.lastSize && (this.linked("width") || this.linked("height")) ? this.lastSize : widget
    return size.map((side) => Math.max(side || 0, 16))
  }

  /** The height in CSS pixels at which the canvas fills the node's width. */
  get room() {
    const [width, height] = this.size
    return Math.round(Math.min(Math.max(((this.node.size[0] - 2 * MARGIN) * height) / width, 160), 720))
  }

  /** Make room for the canvas in a node that has too little, as after another width or height, or from an old file. */
  grow() {
    this.least = this.room
    this.canvas.style.minHeight = `${this.least}px`
    const [width, height] = this.node.size
    const needed = this.node.computeSize?.()[1] ?? 0
    if (!globalThis.LiteGraph?.vueNodesMode && needed > height) this.node.setSize([width, needed])
  }

  // What is connected, and its pictures.

  /** Inputs with a picture by name, the background first, then references by the number of their socket. */
  sockets() {
    const found = []
    for (const [slot, input] of (this.node.inputs ?? []).entries()) {
      if (input.link == null) continue
      const number = /^references\.reference_(\d+)$/.exec(input.name)?.[1]
      const name = number ?? (input.name === layout.BACKGROUND ? layout.BACKGROUND : null)
      if (name) found.push([name, slot])
    }
    return new Map(found.sort(([a], [b]) => numberOf(a) - numberOf(b)))
  }

  /** The picture that a node before this one shows, as its IMAGE is; null where none is known. */
  shownBefore(slot, name) {
    let node = this.node.getInputNode?.(slot)
    let cut = (this.node.inputs ?? []).some((input) => input.name === `masks.mask_${name}` && input.link != null)
    for (let step = 0; node && step < STEPS_BACK; step++) {
      const picture = node.imgs?.[0]
      if (picture?.naturalWidth) return !cut && /^LoadImage/.test(node.comfyClass) ? this.withoutAlpha(picture) : picture
      cut ||= Boolean(node.isSubgraphNode?.()) || (node.inputs ?? []).some((input) => input.link != null && input.type === "MASK")
      const next = (node.inputs ?? []).findIndex((input) => input.link != null && /^(IMAGE|\*)$/.test(input.type))
      node = next < 0 ? null : node.getInputNode?.(next)
    }
    return null
  }

  /** Load Image shows a transparent file cut out, and gives it whole: here it is seen as it will be used. */
  withoutAlpha(picture) {
    const src = `${picture.src}&channel=rgb`
    if (!picture.src.includes("/view?") || picture.src.includes("channel=")) return picture
    if (this.whole.size > 16) this.whole.clear()
    if (!this.whole.has(src)) this.whole.set(src, Object.assign(new Image(), { src }))
    const whole = this.whole.get(src)
    return whole.complete && whole.naturalWidth ? whole : null
  }

  sourceOf(slot) {
    const link = this.node.getInputLink?.(slot)
    return link ? `${link.origin_id}:${link.origin_slot}` : ""
  }

  /** Bring the pictures up to date with the links; a picture of the last run stays until its socket gets another. */
  collect(sockets) {
    for (const name of this.pictures.keys()) if (!sockets.has(name)) this.pictures.delete(name)
    for (const [name, slot] of sockets) {
      const source = this.sourceOf(slot)
      const before = this.shownBefore(slot, name)
      const known = this.pictures.get(name)
      const src = before?.src ?? ""
      if (known && known.source === source && (known.before === src || !src)) continue
      if (known?.ran && known.source === source && !known.before) {
        known.before = src
        continue
      }
      if (before) this.pictures.set(name, { picture: before, size: [before.naturalWidth, before.naturalHeight], source, before: src })
      else this.pictures.delete(name)
    }
  }

  /** After a run: the pictures as they were placed, cropped to their content, with their whole size. */
  ran(output) {
    const files = output?.frame_memory_pictures
    if (!files || !this.node.graph) return
    const sockets = this.sockets()
    const size = output.frame_memory_canvas?.[0]
    this.lastSize = size ? [size.width, size.height] : null
    for (const file of files) {
      if (!sockets.has(file.name)) continue
      const picture = new Image()
      picture.onload = () => this.draw()
      const query = new URLSearchParams({ filename: file.filename, subfolder: file.subfolder ?? "", type: file.type })
      picture.src = api.apiURL(`/view?${query}`)
      const slot = sockets.get(file.name)
      const before = this.shownBefore(slot, file.name)?.src ?? ""
      this.pictures.set(file.name, { picture, size: [file.width, file.height], source: this.sourceOf(slot), before, ran: true })
    }
    this.draw()
  }

  // Boxes.

  boxes(as = this.value("layout")) {
    const names = [...this.sockets().keys()]
    const sizes = new Map([...this.pictures].map(([name, { size }]) => [name, size]))
    const [width, height] = this.size
    return layout.layOut({
      width, height, names, sizes,
      layout: as, boxes: String(this.value("boxes", "")),
      keepAspect: this.value("keep_background_aspect", false), enlarge: this.value("enlarge_small", false),
    })
  }

  /** The layout before the first drag, where Reset goes back to. */
  get usual() {
    const before = this.node.properties?.[BEFORE]
    return before === layout.TWO_COLUMNS ? before : layout.STACK
  }

  /** Write boxes, and what of the text is not theirs: notes, and boxes of pictures that are not connected now. */
  store(boxes) {
    const text = String(this.value("boxes", ""))
    const before = this.value("layout")
    const free = before === layout.FREE
    const connected = this.sockets()
    const kept = free ? layout.parseBoxes(text) : new Map()
    for (const [name, box] of kept) if (!connected.has(name)) boxes.set(name, box)
    if (!free) this.node.properties = { ...this.node.properties, [BEFORE]: before }
    this.set("layout", layout.FREE)
    this.set("boxes", layout.rewrite(free ? text : layout.asNotes(text), boxes))
    this.node.graph?.setDirtyCanvas?.(true, true)
    this.draw()
  }

  /** Let the undo list of the editor see a change that is complete. */
  remember() {
    app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.captureCanvasState?.()
  }

  /** The selected picture back to where it would lie by itself; with none selected, all of them. */
  reset() {
    if (this.locked || this.value("layout") !== layout.FREE) return
    const text = String(this.value("boxes", ""))
    const left = layout.parseBoxes(text)
    if (this.selected === null) left.clear()
    else {
      const place = this.boxes(this.usual).get(this.selected)
      if (place && this.usual !== layout.STACK) left.set(this.selected, place)
      else left.delete(this.selected)
    }
    this.set("boxes", layout.rewrite(text, left))
    if (!left.size) this.set("layout", this.usual)
    this.draw()
    this.remember()
  }

  reorder(step) {
    const boxes = [...this.boxes()]
    const at = boxes.findIndex(([name]) => name === this.selected)
    const to = at + step
    if (this.locked || at < 0 || to < 0 || to >= boxes.length) return
    ;[boxes[at], boxes[to]] = [boxes[to], boxes[at]]
    this.store(new Map(boxes))
    this.remember()
  }

  /** After another width or height, typed or dragged: free boxes keep their part of the canvas. */
  follow() {
    const [before, now] = [this.seenSize, this.size]
    this.seenSize = now
    if (!before || this.locked || this.value("layout") !== layout.FREE) return
    const text = String(this.value("boxes", ""))
    if (layout.wrongIn(text, [], now)) return
    // Many small steps, as of a widget that is dragged, are one step from the first, or they would add up errors.
    if (this.followed?.text !== text) this.followed = { from: before, boxes: layout.parseBoxes(text) }
    const { from, boxes } = this.followed
    this.followed.text = layout.rewrite(text, layout.resized(boxes, from, now))
    if (boxes.size) this.set("boxes", this.followed.text)
  }

  // Pointer and keys.

  /** Where the canvas of the video lies in this element: scale, left, top, in CSS pixels. */
  view() {
    const [width, height] = this.size
    const { clientWidth, clientHeight } = this.canvas
    const scale = Math.max(Math.min((clientWidth - 2 * MARGIN) / width, (clientHeight - 2 * MARGIN) / height), 1e-3)
    return { scale, left: (clientWidth - scale * width) / 2, top: (clientHeight - scale * height) / 2 }
  }

  /** A pointer's place in pixels of the video's canvas; the graph may be zoomed. */
  place(event) {
    const bounds = this.canvas.getBoundingClientRect()
    const zoom = bounds.width / this.canvas.clientWidth || 1
    const { scale, left, top } = this.view()
    const x = ((event.clientX - bounds.left) / zoom - left) / scale
    const y = ((event.clientY - bounds.top) / zoom - top) / scale
    return { x, y, near: NEAR / scale }
  }

  /** The box under a place, the selected one before those drawn over it, and the corner that is meant or null. */
  hit({ x, y, near }) {
    const boxes = [...this.boxes()].reverse()
    const chosen = boxes.find(([name]) => name === this.selected)
    const corner = chosen && cornerAt(chosen[1], x, y, near)
    if (corner) return { name: this.selected, corner }
    const inside = ([, b]) => x >= b.x && y >= b.y && x < b.x + b.width && y < b.y + b.height
    const found = boxes.find(inside) ?? boxes.find(([, b]) => cornerAt(b, x, y, near))
    return found ? { name: found[0], corner: cornerAt(found[1], x, y, near) } : null
  }

  listen() {
    const canvas = this.canvas
    canvas.addEventListener("pointerdown", (event) => this.press(event))
    canvas.addEventListener("pointermove", (event) => this.move(event))
    for (const type of ["pointerup", "pointercancel", "lostpointercapture"]) {
      canvas.addEventListener(type, (event) => this.release(event))
    }
    canvas.addEventListener("keydown", (event) => this.key(event))
    canvas.addEventListener("focus", () => this.draw())
    canvas.addEventListener("blur", () => this.draw())
    // The graph is zoomed and panned over the editor as it is elsewhere.
    canvas.addEventListener("wheel", (event) => {
      if (!globalThis.LiteGraph?.vueNodesMode) app.canvas?.processMouseWheel?.(event)
    })
  }

  press(event) {
    if (event.button === 1) app.canvas?.processMouseDown?.(event)
    if (event.button !== 0) return
    event.stopPropagation()
    this.canvas.focus()
    const at = this.place(event)
    const found = this.hit(at)
    this.selected = found?.name ?? null
    if (found && !this.locked) {
      this.canvas.setPointerCapture(event.pointerId)
      this.drag = { ...found, from: at, box: { ...this.boxes().get(found.name) }, changed: false }
    }
    this.draw()
  }

  move(event) {
    if (event.buttons & 4) app.canvas?.processMouseMove?.(event)
    const at = this.place(event)
    const over = this.drag ?? this.hit(at)
    this.canvas.style.cursor = this.locked ? "not-allowed" : cursorOf(over)
    if (!this.drag) return
    event.stopPropagation()
    const { name, corner, from, box } = this.drag
    const [dx, dy] = [at.x - from.x, at.y - from.y]
    if (!this.drag.changed && Math.hypot(dx, dy) < at.near / 5) return
    this.drag.changed = true
    const next = corner ? layout.scaled(box, corner, dx, dy, event.shiftKey, this.size) : layout.moved(box, dx, dy, this.size)
    this.store(this.boxes().set(name, next))
  }

  release(event) {
    if (event.button === 1) app.canvas?.processMouseUp?.(event)
    const changed = this.drag?.changed
    this.drag = null
    if (changed) this.remember()
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return
    const boxes = this.boxes()
    const box = boxes.get(this.selected)
    const chosen = /^[1-9]$/.test(event.key) ? event.key : event.key === "b" ? layout.BACKGROUND : null
    const edits = ARROWS[event.key] || ["[", "]", "+", "-", "Delete", "Backspace"].includes(event.key)
    if (boxes.has(chosen)) this.selected = chosen
    else if (event.key === "Escape" && box) this.selected = null
    else if (!edits) return
    else if (box && !this.locked) this.edit(event, boxes, box)
    // The graph never hears of these keys, or it would delete the whole node.
    event.stopPropagation()
    event.preventDefault()
    this.draw()
  }

  /** What a key does to the selected box. */
  edit(event, boxes, box) {
    const arrow = ARROWS[event.key]
    const far = event.shiftKey ? 16 : 1
    if (arrow) this.store(boxes.set(this.selected, layout.moved(box, far * arrow[0], far * arrow[1], this.size)))
    else if (event.key === "]" || event.key === "[") this.reorder(event.key === "]" ? 1 : -1)
    else if (event.key === "+" || event.key === "-") {
      const grown = (event.key === "+" ? 1 : -1) * Math.max(Math.round(box.width / 50), 1)
      this.store(boxes.set(this.selected, layout.scaled(box, [1, 1], grown, -Infinity, false, this.size)))
    } else this.reset()
  }

  // Drawing.

  /** Draw again when anything that is drawn has changed: values, links, pictures, size, zoom. */
  look() {
    if (!this.node.graph) return
    const sockets = this.sockets()
    this.seenSize = this.size
    this.collect(sockets)
    const values = ["width", "height", "layout", "boxes", "keep_background_aspect", "enlarge_small", "canvas_colour"]
    const bounds = this.canvas.getBoundingClientRect()
    const pictures = [...this.pictures].map(([name, p]) => [name, p.picture.src, p.picture.complete, p.size])
    const seen = [values.map((name) => this.value(name)), [...sockets], pictures, bounds.width, bounds.height, this.locked]
    if (this.room !== this.least) this.grow()
    const now = JSON.stringify(seen)
    if (now !== this.drawn) this.draw()
    this.drawn = now
  }

  draw() {
    const canvas = this.canvas
    if (!canvas.clientWidth || !canvas.clientHeight) return
    const density = ((window.devicePixelRatio || 1) * canvas.getBoundingClientRect().width) / canvas.clientWidth
    const sharp = Math.min(density || 1, MOST_PIXELS / Math.max(canvas.clientWidth, canvas.clientHeight))
    canvas.width = Math.round(canvas.clientWidth * sharp)
    canvas.height = Math.round(canvas.clientHeight * sharp)
    const pen = canvas.getContext("2d")
    const [width, height] = this.size
    const { scale, left, top } = this.view()
    pen.setTransform(sharp * scale, 0, 0, sharp * scale, sharp * left, sharp * top)
    pen.fillStyle = layout.readColour(String(this.value("canvas_colour", "")))
    pen.fillRect(0, 0, width, height)
    const boxes = [...this.boxes()]
    pen.save()
    pen.beginPath()
    pen.rect(0, 0, width, height)
    pen.clip()
    for (const [name, box] of boxes) this.drawPicture(pen, name, box)
    pen.restore()
    for (const [name, box] of boxes) if (name !== this.selected) this.drawFrame(pen, name, box, 1 / scale)
    for (const [name, box] of boxes) if (name === this.selected) this.drawFrame(pen, name, box, 1 / scale)
    this.say(boxes)
    canvas.style.outline = document.activeElement === canvas ? "2px solid var(--p-primary-color,#4a90e2)" : "none"
  }

  say(boxes) {
    const box = boxes.find(([name]) => name === this.selected)?.[1]
    const free = this.value("layout") === layout.FREE && !this.locked
    const wrong = free ? layout.wrongIn(String(this.value("boxes", "")), [...this.sockets().keys()], this.size) : ""
    let text = "Drag a picture; its corners scale it"
    if (!boxes.length) text = "Connect references and a background"
    else if (wrong) text = wrong
    else if (box) text = `${label(this.selected)}: ${box.width} × ${box.height} at ${box.x}, ${box.y}`
    else if (this.locked) text = "The boxes come from a link"
    if (this.said.textContent !== text) this.said.textContent = this.said.title = text
  }

  drawPicture(pen, name, box) {
    const known = this.pictures.get(name)
    if (known?.picture.complete && known.picture.naturalWidth) {
      const keep = this.value("keep_background_aspect", false)
      const at = layout.covered(name, box, known.size, keep)
      pen.drawImage(known.picture, at.x, at.y, at.width, at.height)
      return
    }
    pen.globalAlpha = 0.18
    pen.fillStyle = COLOURS[numberOf(name) % COLOURS.length]
    pen.fillRect(box.x, box.y, box.width, box.height)
    pen.globalAlpha = 1
  }

  /** unit: one CSS pixel in pixels of the video's canvas. */
  drawFrame(pen, name, box, unit) {
    const chosen = name === this.selected
    const colour = COLOURS[numberOf(name) % COLOURS.length]
    pen.strokeStyle = colour
    pen.lineWidth = (chosen ? 2.5 : 1.25) * unit
    pen.strokeRect(box.x, box.y, box.width, box.height)
    pen.font = `600 ${11 * unit}px sans-serif`
    pen.textBaseline = "middle"
    const text = box.width / unit < 80 && name !== layout.BACKGROUND ? name : label(name)
    const [width, height] = [pen.measureText(text).width + 8 * unit, 16 * unit]
    const [most, tallest] = this.size
    // Beside a small picture there is room for its name; on it the name would hide it.
    const beside = box.width < 1.5 * width && box.x >= width ? width : 0
    const x = Math.min(Math.max(box.x - beside, 0), most - width)
    const y = Math.min(Math.max(box.y, 0), tallest - height)
    pen.fillStyle = colour
    pen.fillRect(x, y, width, height)
    pen.fillStyle = "#fff"
    pen.fillText(text, x + 4 * unit, y + height / 2 + unit / 2)
    if (!chosen || this.locked) return
    for (const [cx, cy] of CORNERS) {
      const side = HANDLE * unit
      const [at, down] = [box.x + cx * box.width - side / 2, box.y + cy * box.height - side / 2]
      pen.fillStyle = "#fff"
      pen.fillRect(at, down, side, side)
      pen.lineWidth = 1.5 * unit
      pen.strokeRect(at, down, side, side)
    }
  }
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
const CORNERS = [[0, 0], [1, 0], [0, 1], [1, 1]]

function cornerAt(box, x, y, near) {
  const at = ([cx, cy]) => Math.hypot(x - box.x - cx * box.width, y - box.y - cy * box.height) <= near
  return [...CORNERS].reverse().find(at) ?? null
}

function cursorOf(found) {
  if (!found) return "default"
  if (!found.corner) return "move"
  return found.corner[0] === found.corner[1] ? "nwse-resize" : "nesw-resize"
}

/** The frontend's name of a node among the outputs of the last runs: inside a subgraph with the subgraph before it. */
function keyOf(node) {
  const inner = node.graph && node.graph !== (node.graph.rootGraph ?? node.graph)
  return inner ? `${node.graph.id}:${node.id}` : String(node.id)
}

/** Run `after` behind a callback of the node; another extension's callback stays. */
function chain(node, name, after) {
  const before = node[name]
  node[name] = function (...parts) {
    const result = before?.apply(this, parts)
    after(...parts)
    return result
  }
}

app.registerExtension({
  name: "FrameMemory.FirstFrameComposer",
  nodeCreated(node) {
    if (node.comfyClass !== NODE || !node.addDOMWidget) return
    const editor = new Editor(node)
    const widget = node.addDOMWidget("canvas", "frame-memory-canvas", editor.element, {
      serialize: false,
      hideOnZoom: false,
      // The panel at the side would draw it there, and its width would stay in the node.
      hideInPanel: true,
      getMinHeight: () => editor.room + BELOW,
    })
    widget.serialize = false
    node.frameMemoryEditor = editor
    // The editor shows what the preview below the node would show once more.
    node.hideOutputImages = true
    node.onDrawBackground = () => {}
    chain(node, "onExecuted", (output) => editor.ran(output))
    editor.widget("boxes").options.getMinHeight = () => TEXT
    for (const side of ["width", "height"]) chain(editor.widget(side), "callback", () => editor.follow())
    chain(node, "onConnectionsChange", () => editor.look())
    chain(node, "onAdded", () => editor.start())
    chain(node, "onRemoved", () => editor.stop())
    chain(node, "onConfigure", () => {
      editor.seenSize = editor.size
      // After undo, or back from another workflow, the page still knows the last run.
      requestAnimationFrame(() => editor.ran(app.nodeOutputs?.[keyOf(node)]))
    })
    const [wide, tall] = node.size
    node.setSize([Math.max(wide, 420), Math.max(tall, 780)])
  },
})
