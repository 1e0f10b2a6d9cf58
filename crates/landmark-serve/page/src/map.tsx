// The map of a document: a cell for each block, or for a few in a row, from its beginning to its end. What was read for an answer is lit.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { ReadBlock } from "./api";
import { count, percent } from "./words";

/** How large cells are with the gap beside them, and how many rows of them there may be: large ones, if all blocks have one. */
const LARGE = { pitch: 10, rows: 14 };
const SMALL = { pitch: 8, rows: 28 };
/** Between two cells. */
const GAP = 2;

interface Grid {
  pitch: number;
  columns: number;
  cells: number;
  /** Blocks of a cell. */
  each: number;
}

function gridFor(width: number, blocks: number): Grid {
  const columns = (pitch: number) => Math.max(1, Math.floor((width + GAP) / pitch));
  const { pitch, rows } = blocks <= columns(LARGE.pitch) * LARGE.rows ? LARGE : SMALL;
  const each = Math.max(1, Math.ceil(blocks / (columns(pitch) * rows)));
  return { pitch, columns: columns(pitch), each, cells: Math.max(1, Math.ceil(blocks / each)) };
}

/** Cells from one to before another, as a path. */
function squares({ pitch, columns }: Grid, from: number, to: number): string {
  const side = pitch - GAP;
  let path = "";
  for (let cell = from; cell < to; cell++) path += `M${(cell % columns) * pitch} ${Math.floor(cell / columns) * pitch}h${side}v${side}h-${side}z`;
  return path;
}

export function Map({ blocks, tokens, filled = 1, lit = [], label, opened, open }: {
  /** Of the whole document, as far as it is known. */
  blocks: number;
  tokens: number;
  /** The share of it that is read. */
  filled?: number;
  lit?: ReadBlock[];
  label: string;
  opened?: number | null;
  /** Opens the text of a block, or at a token. */
  open?: (at: ReadBlock | number) => void;
}) {
  const frame = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const watch = new ResizeObserver(([entry]) => setWidth(entry!.contentRect.width));
    watch.observe(frame.current!);
    return () => watch.disconnect();
  }, []);

  const grid = gridFor(Math.max(width, 60), blocks);
  const { pitch, columns, cells, each } = grid;
  const height = Math.ceil(cells / columns) * pitch;
  const ready = Math.round(cells * filled);
  // Of long texts they are long, and an answer that is being written is drawn anew for each token.
  const paths = useMemo(() => [squares(grid, ready, cells), squares(grid, 0, ready)], [pitch, columns, cells, ready]);
  const cellOf = (block: ReadBlock) => Math.min(cells - 1, Math.floor(block.block / each));
  const most = Math.max(...lit.map((block) => block.weight), 1e-9);
  // One light a cell: that of the block in it that was read most.
  const lights = lit.filter((block) => !lit.some((other) => cellOf(other) === cellOf(block) && other.weight > block.weight)).sort((a, b) => a.block - b.block);

  const move = (event: KeyboardEvent) => {
    const buttons = [...frame.current!.querySelectorAll<HTMLButtonElement>("button")];
    const at = buttons.indexOf(event.target as HTMLButtonElement);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const next = buttons[(to + buttons.length) % buttons.length]!;
    buttons.forEach((button) => (button.tabIndex = button === next ? 0 : -1));
    next.focus();
  };
  const click = (event: MouseEvent) => {
    if (!open) return;
    const box = frame.current!.getBoundingClientRect();
    const column = Math.min(columns - 1, Math.floor((event.clientX - box.left) / pitch));
    const cell = Math.floor((event.clientY - box.top) / pitch) * columns + column;
    if (cell < ready) open(Math.min(tokens - 1, Math.floor((cell / cells) * tokens)));
  };

  return (
    <figure class="map">
      <div class={open ? "field opens" : "field"} ref={frame} style={{ height: `${height}px` }} role="group" aria-label={label} onKeyDown={move} onClick={click}>
        {width > 0 && (
          <svg width={columns * pitch} height={height} aria-hidden="true">
            <path class="unread" d={paths[0]} />
            <path class="cell" d={paths[1]} />
          </svg>
        )}
        {width > 0 && lights.map((block, i) => {
          const cell = cellOf(block);
          const named = `Block ${count(block.block)}, ${percent(block.weight)} of the attention, ${percent(block.first_token / Math.max(1, tokens))} into the text`;
          return (
            <button
              key={block.block}
              type="button"
              class="lit"
              data-block={block.block}
              title={named}
              aria-label={named}
              aria-expanded={opened === block.block}
              tabIndex={i === 0 ? 0 : -1}
              style={{
                left: `${(cell % columns) * pitch}px`,
                top: `${Math.floor(cell / columns) * pitch}px`,
                width: `${pitch - GAP}px`,
                height: `${pitch - GAP}px`,
                "--strength": `${Math.round(50 + 50 * Math.sqrt(block.weight / most))}%`,
              }}
              onClick={(event) => (event.stopPropagation(), open?.(block))}
            />
          );
        })}
      </div>
      <figcaption>
        <span>0</span>
        <span>{each === 1 ? "a cell is a block" : `a cell is ${count(each)} blocks`}</span>
        <span>{count(tokens)} tokens</span>
      </figcaption>
    </figure>
  );
}
