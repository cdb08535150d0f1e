/**
 * Where pictures lie on FFGo's first frame: the numbers of frame_memory/plan/canvas.py once more, for the editor.
 *
 * Pure: no page, no graph. Pixels of the canvas, origin at the top left, boxes as {x, y, width, height}.
 */
export const BACKGROUND = "background"
export const FREE = "free boxes"
export const STACK = "official stack"
export const TWO_COLUMNS = "two columns"
const OFFICIAL = [1280, 720]
const LINE = /^(background|reference[\s_]*\d+|\d+)\s*:\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(\d+)\s*[x×,]\s*(\d+)$/i
/** Where Python breaks lines. */
const BREAK = /\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/
/** The least side of a box that is dragged, and how much of one stays on the canvas. */
export const LEAST = 8
/** What the node takes at most, of a side and of a place. */
const MOST_SIDE = 8192

function readLine(line) {
  const found = LINE.exec(line.split("#")[0].trim())
  if (!found) return null
  const name = found[1].toLowerCase().replace(/reference[\s_]*/, "").replace(/^0+(?=\d)/, "")
  const [x, y, width, height] = found.slice(2).map(Number)
  if (name === "0" || Math.min(width, height) < 1) return null
  if (Math.max(width, height, Math.abs(x), Math.abs(y)) > MOST_SIDE) return null
  return [name, { x, y, width, height }]
}

/** Boxes of the text by name, in the order they are drawn; lines that cannot be read are left to the node to refuse. */
export function parseBoxes(text) {
  return new Map(text.split(BREAK).map(readLine).filter(Boolean))
}

/** What the node will refuse of the text, for pictures of these names on this canvas; "" where it takes all of it. */
export function wrongIn(text, names, [width, height]) {
  const known = new Set()
  for (const [at, line] of text.split(BREAK).entries()) {
    if (!line.split("#")[0].trim()) continue
    const [name, b] = readLine(line) ?? []
    if (!name) return `Line ${at + 1} of boxes cannot be read`
    if (known.has(name)) return `Line ${at + 1} of boxes: ${name} has a box already`
    known.add(name)
    const outside = b.x >= width || b.y >= height || b.x + b.width <= 0 || b.y + b.height <= 0
    if (outside && names.includes(name)) return `Line ${at + 1} of boxes is off the canvas`
  }
  return ""
}

const asNote = (line) => (line.trim().startsWith("#") ? line.trim() : `# ${line.trim()}`)

/** The text with all its lines as notes, each once. */
export function asNotes(text) {
  return [...new Set(text.split(BREAK).filter((line) => line.trim()).map(asNote))].join("\n")
}

/**
 * The text with these boxes, as the node reads it. Nothing the artist wrote is lost: notes above and behind a box stay
 * with it, those above the first box stay at the top, and lines the node would refuse become notes.
 */
export function rewrite(text, boxes) {
  const top = []
  const notes = new Map()
  let waiting = top
  for (const line of text.split(BREAK)) {
    if (!line.trim()) continue
    const name = readLine(line)?.[0]
    const behind = line.includes("#") ? line.slice(line.indexOf("#")).trim() : ""
    if (name && boxes.has(name) && !notes.has(name)) {
      notes.set(name, { above: waiting === top ? [] : waiting, behind })
      waiting = []
    } else if (!name || boxes.has(name)) waiting.push(asNote(line))
    else if (behind) waiting.push(behind)
  }
  const written = [...boxes].flatMap(([name, b]) => {
    const { above = [], behind = "" } = notes.get(name) ?? {}
    return [...above, `${name}: ${b.x}, ${b.y}, ${b.width} x ${b.height} ${behind}`.trim()]
  })
  return [...top, ...written, ...(waiting === top ? [] : waiting)].join("\n")
}

/** The colour the node reads, with or without its #; white for what it refuses. */
export function readColour(text) {
  const digits = text.trim().replace(/^#+/, "")
  return /^([0-9a-f]{3}|[0-9a-f]{6})$/i.test(digits) ? `#${digits}` : "#ffffff"
}

function nearest(number, off) {
  const [down, up] = [Math.floor(number), Math.ceil(number)]
  return Math.max(off(up) < off(down) ? up : down, 1)
}

/** The largest [width, height] of the aspect of `size` inside `room`; smaller pictures stay without `enlarge`. */
export function fit([width, height], [wide, tall], enlarge) {
  if (!enlarge && wide >= width && tall >= height) return [width, height]
  const aspect = width / height
  if (wide / tall >= aspect) return [nearest(tall * aspect, (n) => Math.abs(aspect - n / tall)), tall]
  return [wide, nearest(wide / aspect, (n) => (n === 0 ? 0 : Math.abs(aspect - wide / n)))]
}

function middle([width, height], cell) {
  const x = cell.x + Math.floor((cell.width - width) / 2)
  return { x, y: cell.y + Math.floor((cell.height - height) / 2), width, height }
}

function cells(count, width, height, most) {
  const columns = Math.max(Math.min(most, count), 1)
  const slot = Math.floor(height / Math.max(Math.ceil(count / columns), 1))
  const column = Math.floor(width / columns)
  return Array.from({ length: count }, (_, i) => {
    const at = i % columns
    const alone = columns > 1 && i === count - 1 && at === 0
    return { x: alone ? 0 : at * column, y: Math.floor(i / columns) * slot, width: alone ? width : column, height: slot }
  })
}

/**
 * Boxes by name in the order they are drawn. names: 'background' and numbers, as they are connected. sizes: [width,
 * height] by name where they are known; a picture of unknown size takes the whole of its room.
 */
export function layOut({ width, height, names, sizes, layout, boxes, keepAspect, enlarge }) {
  const references = names.filter((name) => name !== BACKGROUND)
  const left = names.includes(BACKGROUND) ? Math.floor(width / 2) : width
  const usual = new Map()
  const put = (name, size, cell) => {
    usual.set(name, middle(size ? fit(size, [cell.width, cell.height], enlarge) : [cell.width, cell.height], cell))
  }
  if (names.includes(BACKGROUND)) {
    const size = keepAspect ? sizes.get(BACKGROUND) : OFFICIAL
    put(BACKGROUND, size, { x: left, y: 0, width: Math.floor(width / 2), height })
  }
  const rooms = cells(references.length, left, height, layout === TWO_COLUMNS ? 2 : 1)
  references.forEach((name, i) => put(name, sizes.get(name), rooms[i]))
  if (layout !== FREE) return usual
  const written = parseBoxes(boxes)
  const chosen = [...written].filter(([name]) => usual.has(name))
  const rest = [...usual].filter(([name]) => !written.has(name))
  // A background whose line comes first lies under everything, also under what has no line.
  return new Map(chosen[0]?.[0] === BACKGROUND ? [chosen[0], ...rest, ...chosen.slice(1)] : [...rest, ...chosen])
}

/** The part of a box that its picture covers; a background is stretched over all of it unless it keeps its aspect. */
export function covered(name, box, size, keepAspect) {
  if (!size || (name === BACKGROUND && !keepAspect)) return box
  return middle(fit(size, [box.width, box.height], true), box)
}

/** Boxes of a canvas on one of another size, at the same part of it. */
export function resized(boxes, from, to) {
  const [across, down] = [to[0] / from[0], to[1] / from[1]]
  const place = (at) => Math.min(Math.max(Math.round(at), -MOST_SIDE), MOST_SIDE)
  const side = (length) => Math.min(Math.max(Math.round(length), 1), MOST_SIDE)
  const put = (b) => ({ x: place(b.x * across), y: place(b.y * down), width: side(b.width * across), height: side(b.height * down) })
  return new Map([...boxes].map(([name, b]) => [name, put(b)]))
}

/** A box moved by dx, dy; some of it stays on the canvas. */
export function moved(box, dx, dy, [width, height]) {
  const x = Math.round(Math.min(Math.max(box.x + dx, LEAST - box.width), width - LEAST))
  return { ...box, x, y: Math.round(Math.min(Math.max(box.y + dy, LEAST - box.height), height - LEAST)) }
}

/**
 * A box whose corner was pulled by dx, dy; the corner across stays. corner: [0 left or 1 right, 0 top or 1 bottom].
 * free: without keeping the aspect.
 */
export function scaled(box, [right, bottom], dx, dy, free, canvas) {
  const [most, tallest] = canvas
  // Some of it stays on the canvas, though the corner across may lie outside.
  const leastWidth = Math.max(LEAST, right ? LEAST - box.x : box.x + box.width - most + LEAST)
  const leastHeight = Math.max(LEAST, bottom ? LEAST - box.y : box.y + box.height - tallest + LEAST)
  const [mostWidth, mostHeight] = canvas.map((side) => Math.min(2 * side, MOST_SIDE))
  let width = box.width + (right ? dx : -dx)
  let height = box.height + (bottom ? dy : -dy)
  if (!free) {
    const least = Math.max(leastWidth / box.width, leastHeight / box.height)
    const room = Math.min(mostWidth / box.width, mostHeight / box.height)
    const grown = Math.min(Math.max(width / box.width, height / box.height, least), room)
    width = box.width * grown
    height = box.height * grown
  }
  width = Math.round(Math.min(Math.max(width, leastWidth), mostWidth))
  height = Math.round(Math.min(Math.max(height, leastHeight), mostHeight))
  const x = right ? box.x : box.x + box.width - width
  return moved({ x, y: bottom ? box.y : box.y + box.height - height, width, height }, 0, 0, canvas)
}
