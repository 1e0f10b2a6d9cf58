//! How keys are cut into the units that the kernels work on: 64 slots in 8 groups, every block at the start of a group.

use super::params::{BEYOND, Block, GROUP, GROUPS, Group, LANDMARK, SEGMENT_END, UNIT, Unit, View};
use crate::Softmax;
use crate::call::Call;

/// The units of all rows of a call.
#[derive(Debug, Default)]
pub struct Units {
    pub units: Vec<Unit>,
    /// The units of row `b` are `first[b]..first[b + 1]`.
    pub first: Vec<i32>,
    /// Most units of a row.
    pub most: usize,
    /// Most long blocks of a row: blocks that do not fit a unit.
    pub long_blocks: usize,
}

impl Units {
    pub fn new(call: &Call) -> Self {
        let mut all = Self { first: vec![0], ..Self::default() };
        for b in 0..call.batch {
            let mut row = Row::default();
            match call.softmax {
                Softmax::Grouped => row.blocks(call.landmarks(b), call.kv_len),
                Softmax::NoMem => row.plain(0..call.kv_len, call.landmarks(b)),
                Softmax::IgnoreMem => row.ordinary(call.landmarks(b), call.kv_len),
            }
            row.flush();
            all.most = all.most.max(row.units.len());
            all.long_blocks = all.long_blocks.max(row.long_blocks);
            all.units.append(&mut row.units);
            all.first.push(all.units.len() as i32);
        }
        all
    }
}

impl Units {
    /// Each row's units in `count` runs about as long as each other, `[batch, count + 1]`, none of which ends inside a long block.
    pub fn runs(&self, count: usize) -> Vec<i32> {
        let mut borders = Vec::with_capacity((self.first.len() - 1) * (count + 1));
        for row in self.first.windows(2) {
            let units = &self.units[row[0] as usize..row[1] as usize];
            for i in 0..=count {
                let border = i * units.len() / count;
                borders.push(match units.get(border) {
                    Some(unit) if unit.long_block >= 0 => unit.part_first,
                    _ => border as i32,
                });
            }
        }
        borders
    }
}

/// `L` if every `L`-th key of every row is a landmark and nothing else is, and the softmax is grouped.
pub fn regular_block(call: &Call) -> Option<usize> {
    let block = call.landmarks(0).first()? + 1;
    let regular = |b| {
        let row = call.landmarks(b);
        row.len() == call.kv_len / block && row.iter().enumerate().all(|(i, &l)| l + 1 == (i + 1) * block)
    };
    (call.softmax == Softmax::Grouped && (0..call.batch).all(regular)).then_some(block)
}

/// The blocks of all rows for Hopper's kernels, which give each block 64 slots of its own.
#[derive(Debug)]
pub struct BlockList {
    /// Rows of `stride` blocks, filled up with blocks of keys that do not exist.
    pub blocks: Vec<Block>,
    pub stride: usize,
    /// For each row and each 64 queries.
    pub views: Vec<View>,
}

impl BlockList {
    /// Queries of a view.
    const QUERIES: usize = 64;
    /// Fewer keys than this share of the slots, and the kernels that pack small blocks are the faster ones.
    const LEAST_FILLED: f64 = 0.4;

    /// `None` where a block has more keys than slots, or the blocks are too small to be worth it.
    pub fn new(call: &Call) -> Option<Self> {
        if call.softmax != Softmax::Grouped {
            return None;
        }
        let rows: Option<Vec<_>> = (0..call.batch).map(|b| Self::row(call.landmarks(b), call.kv_len)).collect();
        let rows = rows?;
        let stride = rows.iter().map(Vec::len).max()?.next_multiple_of(2);
        if (call.kv_len as f64) < Self::LEAST_FILLED * (stride * UNIT) as f64 {
            return None;
        }
        let history = call.kv_len - call.q_len;
        let (mut blocks, mut views) = (Vec::with_capacity(rows.len() * stride), Vec::new());
        for row in rows {
            for first in (0..call.q_len).step_by(Self::QUERIES) {
                let last = history + call.q_len.min(first + Self::QUERIES) - 1;
                views.push(View {
                    seen: row.partition_point(|block| block.start as usize <= last) as i32,
                    behind: row.partition_point(|block| (block.start + block.n) as usize <= history + first) as i32,
                });
            }
            let missing = Block { start: call.kv_len as i32, n: BEYOND };
            let filled = blocks.len() + stride;
            blocks.extend(row);
            blocks.resize(filled, missing);
        }
        Some(Self { blocks, stride, views })
    }

    fn row(landmarks: &[usize], kv_len: usize) -> Option<Vec<Block>> {
        let (mut row, mut start) = (Vec::new(), 0);
        for &landmark in landmarks {
            let n = landmark + 1 - start;
            if n > UNIT {
                return None;
            }
            row.push(Block { start: start as i32, n: n as i32 });
            start = landmark + 1;
        }
        // Every query that sees a piece of the unfinished block is in it; the landmark's slot stays empty.
        row.extend((start..kv_len).step_by(UNIT - 1).map(|start| Block { start: start as i32, n: BEYOND }));
        Some(row)
    }
}

#[derive(Default)]
struct Row {
    units: Vec<Unit>,
    open: Vec<Group>,
    long_blocks: usize,
}

impl Row {
    fn blocks(&mut self, landmarks: &[usize], kv_len: usize) {
        let mut start = 0;
        for &landmark in landmarks {
            let n = landmark + 1 - start;
            if n <= UNIT {
                self.make_room(n);
                self.put(start..landmark + 1, SEGMENT_END | LANDMARK, &[]);
            } else {
                self.flush();
                let first = self.units.len();
                self.plain(start..landmark + 1, &[]);
                let last = self.units.len() - 1;
                for unit in &mut self.units[first..] {
                    unit.long_block = self.long_blocks as i32;
                    unit.landmark = landmark as i32;
                    (unit.part_first, unit.part_last) = (first as i32, last as i32);
                }
                let groups = &mut self.units[last].groups;
                let closing = groups.iter_mut().rfind(|group| group.count > 0).expect("a unit has keys");
                closing.flags |= LANDMARK;
                self.long_blocks += 1;
            }
            start = landmark + 1;
        }
        // The unfinished block: every query that sees it is in it.
        if kv_len - start <= UNIT {
            self.make_room(kv_len - start);
            self.put(start..kv_len, SEGMENT_END, &[]);
        } else {
            self.plain(start..kv_len, &[]);
        }
    }

    /// Keys in units of their own, cut anywhere. A query does not see itself if it is in `hidden` (ascending).
    fn plain(&mut self, keys: std::ops::Range<usize>, hidden: &[usize]) {
        self.flush();
        for start in keys.clone().step_by(UNIT) {
            self.put(start..keys.end.min(start + UNIT), SEGMENT_END, hidden);
            self.flush();
        }
    }

    /// The keys that are no landmarks.
    fn ordinary(&mut self, landmarks: &[usize], kv_len: usize) {
        let mut start = 0;
        for &end in landmarks.iter().chain([&kv_len]) {
            let mut from = start;
            while from < end {
                let group = from..end.min(from + GROUP);
                if self.open.len() == GROUPS {
                    self.flush();
                }
                from = group.end;
                self.put(group, 0, &[]);
            }
            start = end + 1;
        }
        self.flush();
        for unit in &mut self.units {
            let last = unit.groups.iter_mut().rfind(|group| group.count > 0).expect("a unit has keys");
            last.flags |= SEGMENT_END;
        }
    }

    fn make_room(&mut self, keys: usize) {
        if self.open.len() + keys.div_ceil(GROUP) > GROUPS {
            self.flush();
        }
    }

    /// Groups for `keys`, the last one with `flags`.
    fn put(&mut self, keys: std::ops::Range<usize>, flags: u8, hidden: &[usize]) {
        for start in keys.clone().step_by(GROUP) {
            let end = keys.end.min(start + GROUP);
            let bits = &hidden[hidden.partition_point(|&j| j < start)..hidden.partition_point(|&j| j < end)];
            self.open.push(Group {
                start: start as i32,
                count: (end - start) as u8,
                flags: if end == keys.end { flags } else { 0 },
                hidden: bits.iter().fold(0, |bits, j| bits | 1 << (j - start)),
                reserved: 0,
            });
        }
    }

    fn flush(&mut self) {
        let Some(last) = self.open.last() else { return };
        let none = -1;
        let mut unit = Unit {
            first_key: self.open[0].start,
            last_key: last.start + last.count as i32 - 1,
            long_block: none,
            landmark: none,
            part_first: none,
            part_last: none,
            ..Unit::default()
        };
        unit.groups[..self.open.len()].copy_from_slice(&self.open);
        self.units.push(unit);
        self.open.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LandmarkParams, Landmarks};
    use candle_core::{DType, Device, Tensor};

    fn call(landmarks: &[u8], q_len: usize, softmax: Softmax) -> Call {
        let kv_len = landmarks.len();
        let x = |steps| Tensor::zeros((1, 1, steps, 8), DType::F32, &Device::Cpu).unwrap();
        let mask = Tensor::from_slice(landmarks, (1, kv_len), &Device::Cpu).unwrap();
        let params = LandmarkParams { softmax, ..LandmarkParams::new(Landmarks::Mask(mask)) };
        Call::check(&x(q_len), &x(kv_len), &x(kv_len), &params).unwrap()
    }

    fn keys(unit: &Unit) -> Vec<i32> {
        unit.groups.iter().flat_map(|group| group.start..group.start + group.count as i32).collect()
    }

    /// Landmarks after `gaps` ordinary tokens each, then `tail` tokens.
    fn row(gaps: &[usize], tail: usize) -> Vec<u8> {
        let mut row: Vec<u8> = gaps.iter().flat_map(|&gap| std::iter::repeat_n(0, gap).chain([1])).collect();
        row.resize(row.len() + tail, 0);
        row
    }

    #[test]
    fn every_key_is_in_one_slot() {
        let landmarks = row(&[3, 0, 20, 63, 64, 200, 7], 150);
        for (softmax, expected) in [
            (Softmax::Grouped, (0..landmarks.len()).collect::<Vec<_>>()),
            (Softmax::NoMem, (0..landmarks.len()).collect()),
            (Softmax::IgnoreMem, (0..landmarks.len()).filter(|&j| landmarks[j] == 0).collect()),
        ] {
            let units = Units::new(&call(&landmarks, 10, softmax));
            let found: Vec<usize> = units.units.iter().flat_map(keys).map(|key| key as usize).collect();
            assert_eq!(found, expected, "{softmax:?}");
            assert_eq!((units.first, units.most), (vec![0, units.units.len() as i32], units.units.len()));
        }
    }

    #[test]
    fn blocks_are_whole_and_long_ones_have_units_of_their_own() {
        let units = Units::new(&call(&row(&[3, 9, 99, 15], 4), 10, Softmax::Grouped));
        let shape: Vec<_> = units.units.iter().map(|unit| (unit.first_key, unit.last_key, unit.long_block)).collect();
        assert_eq!(shape, [(0, 13, -1), (14, 77, 0), (78, 113, 0), (114, 133, -1)]);
        assert_eq!(units.long_blocks, 1);
        let long = &units.units[1..3];
        assert!(long.iter().all(|unit| (unit.landmark, unit.part_first, unit.part_last) == (113, 1, 2)));
        let flags = |unit: &Unit| unit.groups.map(|group| group.flags);
        let closing = SEGMENT_END | LANDMARK;
        assert_eq!(flags(&units.units[0]), [closing, 0, closing, 0, 0, 0, 0, 0]);
        assert_eq!(flags(&long[0]), [0, 0, 0, 0, 0, 0, 0, SEGMENT_END]);
        assert_eq!(flags(&long[1]), [0, 0, 0, 0, closing, 0, 0, 0]);
        assert_eq!(flags(&units.units[3]), [0, closing, SEGMENT_END, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn runs_do_not_cut_long_blocks() {
        // A unit of small blocks, three of a long block, four of another, one of the unfinished block.
        let units = Units::new(&call(&row(&[3, 9, 150, 240], 4), 1, Softmax::Grouped));
        assert_eq!(units.units.len(), 9);
        assert_eq!(units.runs(3), [0, 1, 4, 9]);
        assert_eq!(units.runs(9), [0, 1, 1, 1, 4, 4, 4, 4, 8, 9]);
    }

    #[test]
    fn a_list_of_blocks_says_who_sees_them() {
        let list = BlockList::new(&call(&row(&[49, 40, 62], 100), 150, Softmax::Grouped)).unwrap();
        let block = |start, n| Block { start, n };
        assert_eq!(list.stride, 6);
        let missing = block(254, BEYOND);
        let expected = [block(0, 50), block(50, 41), block(91, 63), block(154, BEYOND), block(217, BEYOND), missing];
        assert_eq!(list.blocks, expected);
        // Queries 104..168, 168..232, 232..254.
        let view = |seen, behind| View { seen, behind };
        assert_eq!(list.views, [view(4, 2), view(5, 3), view(5, 3)]);
        for gaps in [vec![10; 20], vec![64]] {
            assert!(BlockList::new(&call(&row(&gaps, 0), 10, Softmax::Grouped)).is_none());
        }
    }

    #[test]
    fn regular_blocks_are_found_in_masks() {
        assert_eq!(regular_block(&call(&row(&[4, 4, 4], 3), 5, Softmax::Grouped)), Some(5));
        assert_eq!(regular_block(&call(&row(&[4, 4, 4], 5), 5, Softmax::Grouped)), None);
        assert_eq!(regular_block(&call(&row(&[4, 3, 4], 2), 5, Softmax::Grouped)), None);
        assert_eq!(regular_block(&call(&row(&[4, 4], 0), 5, Softmax::NoMem)), None);
        assert_eq!(regular_block(&call(&[0, 0], 2, Softmax::Grouped)), None);
    }
}
