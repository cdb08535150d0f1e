/**
 * The canvas of First Frame Composer, inside the node: references are dragged, scaled and put in order.
 *
 * The text widget `boxes` is the truth. The editor reads it, draws it, and writes it; a workflow that is shared carries
 * it as any other value, and the node works the same without this file.
 */
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

const NODE = "FrameMemoryFirstFrameComposer"
const FREE = "free boxes"
const COLOURS = ["#e84a27", "#1e88e5", "#43a047", "#fda720", "#8e24aa", "#0097a7"]
const LINE = /^(background|reference\s*\d+|\d+)\s*:\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(\d+)\s*[x×,]\s*(\d+)$/i
const HANDLE = 9
const LEAST = 8

/** Boxes of the text by name, in the order they are drawn; lines that cannot be read are left to the node to refuse. */
export function parseBoxes(text) {
  const boxes = new Map()
  for (const line of text.split("\n")) {
    const found = LINE.exec(line.split("#")[0].trim())
    if (!found) continue
    const name = found[1].toLowerCase().replace(/reference\s*/, "").replace(/^0+(?=\d)/, "")
    const [x, y, width, height] = found.slice(2).map(Number)
    boxes.set(name, { x, y, width, height })
  }
  return boxes
}

/** The text of boxes, as the node reads it. */
export function writeBoxes(boxes) {
  return [...boxes].map(([name, b]) => `${name}: ${b.x}, ${b.y}, ${b.width} x ${b.height}`).join("\n")
}

/** The usual places: the background right, references under one another on the left, each the whole of its slot. */
export function usualBoxes(names, width, height) {
  const boxes = new Map()
  const references = names.filter((name) => name !== "background")
  const left = names.includes("background") ? Math.floor(width / 2) : width
  if (names.includes("background")) {
    const tall = Math.min(Math.round((left * 9) / 16), height)
    boxes.set("background", { x: left, y: Math.floor((height - tall) / 2), width: left, height: tall })
  }
  const slot = Math.floor(height / Math.max(references.length, 1))
  references.forEach((name, i) => boxes.set(name, { x: 0, y: i * slot, width: left, height: slot }))
  return boxes
}

class Editor {
  constructor(node) {
    this.node = node
    this.selected = null
    this.drag = null
    this.pictures = new Map()
    this.made = new Map()
    this.element = document.createElement("div")
    this.element.className = "frame-memory-composer"
    this.element.style.cssText = "display:flex;flex-direction:column;gap:4px;width:100%;height:100%;min-height:0"
    this.canvas = document.createElement("canvas")
    this.canvas.style.cssText = "flex:1;min-height:0;width:100%;background:#2a2a2e;border-radius:4px;touch-action:none"
    this.canvas.tabIndex = 0
    this.canvas.setAttribute("aria-label", "Canvas: drag a reference to move it, its corner to scale it")
    this.element.append(this.canvas, this.bar())
    this.listen()
    new ResizeObserver(() => this.draw()).observe(this.canvas)
  }

  bar() {
    const bar = document.createElement("div")
    bar.style.cssText = "display:flex;gap:4px;flex:none"
    const buttons = [
      ["Forward", "Draw the selected picture later, over others (or press ])", () => this.reorder(1)],
      ["Back", "Draw the selected picture earlier, under others (or press [)", () => this.reorder(-1)],
      ["Reset", "Back to the usual places", () => this.reset()],
    ]
    for (const [text, title, action] of buttons) {
      const button = document.createElement("button")
      Object.assign(button, { type: "button", textContent: text, title, onclick: action })
      button.style.cssText = "flex:1;padding:2px 6px;border:0;border-radius:4px;background:#3a3a40;color:#ddd;cursor:pointer"
      bar.append(button)
    }
    return bar
  }

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
    widget.callback?.(value)
  }

  get size() {
    return [Number(this.value("width", 1280)), Number(this.value("height", 720))]
  }

  /** Names of what is connected: references count from 1 in the order of their sockets, as the node counts them. */
  names() {
    const connected = (this.node.inputs ?? []).filter((input) => input.link != null)
    const count = connected.filter((input) => /^references\.reference_\d+$/.test(input.name)).length
    const names = Array.from({ length: count }, (_, i) => String(i + 1))
    return connected.some((input) => input.name === "background") ? ["background", ...names] : names
  }

  /** What is drawn: the boxes of the text; without one the place the node gave at its last run, else the usual one. */
  boxes() {
    const names = this.names()
    const written = parseBoxes(String(this.value("boxes", "")))
    const usual = usualBoxes(names, ...this.size)
    const free = this.value("layout") === FREE
    const boxes = new Map()
    for (const name of names) {
      if (!free || !written.has(name)) boxes.set(name, this.made.get(name) ?? usual.get(name))
    }
    if (free) for (const [name, box] of written) if (names.includes(name)) boxes.set(name, box)
    return boxes
  }

  store(boxes) {
    const kept = parseBoxes(String(this.value("boxes", "")))
    const text = new Map(boxes)
    // Boxes of pictures that are not connected now stay, so that connecting them again brings them back.
    if (this.value("layout") === FREE) for (const [name, box] of kept) if (!text.has(name)) text.set(name, box)
    this.set("layout", FREE)
    this.set("boxes", writeBoxes(text))
    this.node.graph?.setDirtyCanvas?.(true, true)
    this.draw()
  }

  reset() {
    this.made.clear()
    this.set("boxes", "")
    this.set("layout", "official stack")
    this.draw()
  }

  reorder(step) {
    const boxes = [...this.boxes()]
    const at = boxes.findIndex(([name]) => name === this.selected)
    const to = at + step
    if (at < 0 || to < 0 || to >= boxes.length) return
    ;[boxes[at], boxes[to]] = [boxes[to], boxes[at]]
    this.store(new Map(boxes))
  }

  /** Where the canvas of the video lies in this element: scale, left, top, in CSS pixels. */
  view() {
    const [width, height] = this.size
    const { clientWidth, clientHeight } = this.canvas
    const scale = Math.min((clientWidth - 16) / width, (clientHeight - 16) / height)
    return { scale, left: (clientWidth - scale * width) / 2, top: (clientHeight - scale * height) / 2 }
  }

  /** A pointer's place in pixels of the video's canvas; the graph may be zoomed. */
  place(event) {
    const bounds = this.canvas.getBoundingClientRect()
    const zoom = bounds.width / this.canvas.clientWidth || 1
    const { scale, left, top } = this.view()
    const x = ((event.clientX - bounds.left) / zoom - left) / scale
    const y = ((event.clientY - bounds.top) / zoom - top) / scale
    return { x, y, near: HANDLE / scale }
  }

  /** The topmost box under a place, and whether its corner is meant. */
  hit({ x, y, near }) {
    const boxes = [...this.boxes()].reverse()
    boxes.sort(([a], [b]) => (b === this.selected) - (a === this.selected))
    for (const [name, b] of boxes) {
      if (Math.abs(x - b.x - b.width) <= near && Math.abs(y - b.y - b.height) <= near) return { name, corner: true }
      if (x >= b.x && y >= b.y && x < b.x + b.width && y < b.y + b.height) return { name, corner: false }
    }
    return null
  }

  listen() {
    const canvas = this.canvas
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return
      event.stopPropagation()
      event.preventDefault()
      canvas.focus()
      const at = this.place(event)
      const found = this.hit(at)
      this.selected = found?.name ?? null
      if (found) {
        canvas.setPointerCapture(event.pointerId)
        this.drag = { ...found, from: at, box: { ...this.boxes().get(found.name) } }
      }
      this.draw()
    })
    canvas.addEventListener("pointermove", (event) => {
      const at = this.place(event)
      const over = this.drag ?? this.hit(at)
      canvas.style.cursor = over ? (over.corner ? "nwse-resize" : "move") : "default"
      if (this.drag) {
        event.stopPropagation()
        this.pull(at, event.shiftKey)
      }
    })
    for (const type of ["pointerup", "pointercancel", "lostpointercapture"]) {
      canvas.addEventListener(type, () => (this.drag = null))
    }
    canvas.addEventListener("keydown", (event) => this.key(event))
  }

  /** Move or scale the dragged box; its corner keeps the aspect unless Shift is held. */
  pull(at, free) {
    const { name, corner, from, box } = this.drag
    const dx = at.x - from.x
    const dy = at.y - from.y
    const next = { ...box }
    if (!corner) {
      const [width, height] = this.size
      next.x = Math.round(Math.min(Math.max(box.x + dx, LEAST - box.width), width - LEAST))
      next.y = Math.round(Math.min(Math.max(box.y + dy, LEAST - box.height), height - LEAST))
    } else if (free) {
      next.width = Math.max(Math.round(box.width + dx), LEAST)
      next.height = Math.max(Math.round(box.height + dy), LEAST)
    } else {
      const grown = Math.max((box.width + dx) / box.width, (box.height + dy) / box.height, LEAST / Math.min(box.width, box.height))
      next.width = Math.round(box.width * grown)
      next.height = Math.round(box.height * grown)
    }
    this.store(this.boxes().set(name, next))
  }

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
    const boxes = this.boxes()
    const box = boxes.get(this.selected)
    if (!box) return
    if (event.key === "]" || event.key === "[") this.reorder(event.key === "]" ? 1 : -1)
    else if (event.key in steps) {
      const far = event.shiftKey ? 16 : 1
      const [x, y] = steps[event.key]
      this.store(boxes.set(this.selected, { ...box, x: box.x + far * x, y: box.y + far * y }))
    } else return
    event.stopPropagation()
    event.preventDefault()
  }

  /** After a run: the pictures themselves, and where the node put them. */
  ran(output) {
    this.made = parseBoxes(output?.boxes?.[0] ?? "")
    for (const file of output?.frame_memory_pictures ?? []) {
      const picture = new Image()
      picture.onload = () => this.draw()
      const query = new URLSearchParams({ filename: file.filename, subfolder: file.subfolder, type: file.type })
      picture.src = api.apiURL(`/view?${query}`)
      this.pictures.set(file.name, picture)
    }
    this.draw()
  }

  draw() {
    const canvas = this.canvas
    const density = window.devicePixelRatio || 1
    if (!canvas.clientWidth || !canvas.clientHeight) return
    canvas.width = Math.round(canvas.clientWidth * density)
    canvas.height = Math.round(canvas.clientHeight * density)
    const pen = canvas.getContext("2d")
    const [width, height] = this.size
    const { scale, left, top } = this.view()
    pen.setTransform(density * scale, 0, 0, density * scale, density * left, density * top)
    pen.fillStyle = String(this.value("canvas_colour", "#ffffff"))
    pen.fillRect(0, 0, width, height)
    let at = 0
    for (const [name, box] of this.boxes()) this.drawBox(pen, name, box, COLOURS[at++ % COLOURS.length], 1 / scale)
    pen.strokeStyle = "#888"
    pen.lineWidth = 1 / scale
    pen.strokeRect(0, 0, width, height)
  }

  drawBox(pen, name, box, colour, unit) {
    const picture = this.pictures.get(name)
    if (picture?.complete && picture.naturalWidth) {
      const squeezed = name === "background" && !this.value("keep_background_aspect", false)
      const fit = Math.min(box.width / picture.naturalWidth, box.height / picture.naturalHeight)
      const w = squeezed ? box.width : fit * picture.naturalWidth
      const h = squeezed ? box.height : fit * picture.naturalHeight
      pen.drawImage(picture, box.x + (box.width - w) / 2, box.y + (box.height - h) / 2, w, h)
    } else {
      pen.globalAlpha = 0.25
      pen.fillStyle = colour
      pen.fillRect(box.x, box.y, box.width, box.height)
      pen.globalAlpha = 1
    }
    pen.strokeStyle = colour
    pen.lineWidth = (name === this.selected ? 3 : 1.5) * unit
    pen.strokeRect(box.x, box.y, box.width, box.height)
    pen.fillStyle = colour
    pen.fillRect(box.x + box.width - 4 * unit, box.y + box.height - 4 * unit, 8 * unit, 8 * unit)
    pen.font = `${12 * unit}px sans-serif`
    pen.fillText(name === "background" ? name : `reference ${name}`, box.x + 4 * unit, box.y + 14 * unit)
  }
}

app.registerExtension({
  name: "FrameMemory.FirstFrameComposer",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return
    const editor = new Editor(node)
    const widget = node.addDOMWidget("canvas", "frame-memory-canvas", editor.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => 240,
    })
    widget.serialize = false
    node.frameMemoryEditor = editor
    for (const name of ["width", "height", "layout", "boxes", "keep_background_aspect", "canvas_colour"]) {
      const watched = editor.widget(name)
      if (!watched) continue
      const before = watched.callback
      watched.callback = function (...parts) {
        const result = before?.apply(this, parts)
        editor.draw()
        return result
      }
    }
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.call(this, output)
      editor.ran(output)
    }
    const connected = node.onConnectionsChange
    node.onConnectionsChange = function (...parts) {
      const result = connected?.apply(this, parts)
      editor.draw()
      return result
    }
    const configured = node.onConfigure
    node.onConfigure = function (...parts) {
      const result = configured?.apply(this, parts)
      editor.draw()
      return result
    }
    const [wide, tall] = node.size
    node.setSize([Math.max(wide, 400), Math.max(tall, 640)])
  },
})
