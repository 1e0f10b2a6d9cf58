//! Frames of a tier: units, as many as a budget allows, found in O(1) and given up by the clock algorithm. In RAM they are decoded or encoded; on
//! the device that computes they are places of a pool.

use crate::Result;

/// The place of a unit: layer and head, and the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnitId {
    /// The block, counted from the beginning of the text.
    pub record: usize,
    /// `layer * heads + head`, heads counted over the rows of the batch.
    pub unit: usize,
}

/// What a frame holds a unit in.
pub trait Buffer: Default {
    /// Bytes of an element.
    const ELEMENT: usize;

    /// For so many elements, in the frame of this number.
    fn new(elements: usize, frame: usize) -> Self;
}

/// Decoded: keys, then values.
impl Buffer for Box<[f32]> {
    const ELEMENT: usize = 4;

    fn new(elements: usize, _: usize) -> Self {
        vec![0.; elements].into_boxed_slice()
    }
}

/// Encoded.
impl Buffer for Vec<u8> {
    const ELEMENT: usize = 1;

    fn new(elements: usize, _: usize) -> Self {
        Vec::with_capacity(elements)
    }
}

/// In a pool, whose frames have the same numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place(pub u32);

impl Buffer for Place {
    const ELEMENT: usize = 1;

    fn new(_: usize, frame: usize) -> Self {
        Self(frame as u32)
    }
}

/// A unit to be loaded, and its buffer.
pub type Job<B = Box<[f32]>> = (UnitId, B);

#[derive(Debug)]
struct Frame<B> {
    data: B,
    owner: Option<UnitId>,
    /// Used since the clock's hand came by.
    used: bool,
    /// The last call that needs it.
    epoch: u64,
}

/// Frames for units of one size. A call of [`Frames::hold`] may need more of them than the budget allows: then there are as many until the next
/// call.
#[derive(Debug)]
pub struct Frames<B = Box<[f32]>> {
    elements: usize,
    budget: usize,
    frames: Vec<Frame<B>>,
    free: Vec<u32>,
    /// For each unit the frame of each block, plus 1; 0: none.
    tables: Vec<Vec<u32>>,
    hand: usize,
    epoch: u64,
    loaded: u64,
    found: u64,
}

impl Frames {
    /// Keys and values of a unit, if it is in a frame.
    pub fn get(&self, unit: usize, record: usize) -> Option<[&[f32]; 2]> {
        Some(self.buffer(unit, record)?.split_at(self.elements / 2).into())
    }
}

impl<B: Buffer> Frames<B> {
    /// No frames, for `units` units of so many elements a block, in at most so many bytes.
    pub fn new(units: usize, elements: usize, bytes: usize) -> Self {
        let budget = bytes / (B::ELEMENT * elements);
        Self {
            elements,
            budget,
            frames: Vec::new(),
            free: Vec::new(),
            tables: vec![Vec::new(); units],
            hand: 0,
            epoch: 0,
            loaded: 0,
            found: 0,
        }
    }

    /// Bytes of memory that frames take.
    pub fn bytes(&self) -> usize {
        self.frames.len() * B::ELEMENT * self.elements
    }

    /// Units that were loaded, and that were there already.
    pub fn loads(&self) -> (u64, u64) {
        (self.loaded, self.found)
    }

    /// What holds a unit, if it is in a frame.
    pub fn buffer(&self, unit: usize, record: usize) -> Option<&B> {
        let frame = self.tables[unit].get(record).copied().filter(|&frame| frame > 0)?;
        Some(&self.frames[frame as usize - 1].data)
    }

    /// Sees to it that all these units are in frames, sorted and each once. `load` reads units that are not: it is given those of
    /// one call, and a buffer for each.
    ///
    /// # Errors
    /// What `load` fails with; then none of its units is in a frame.
    pub fn hold(&mut self, units: &[UnitId], load: impl FnOnce(&mut [Job<B>]) -> Result<()>) -> Result<()> {
        self.shrink();
        self.epoch += 1;
        let mut missing = Vec::new();
        for &id in units {
            match self.tables[id.unit].get(id.record).copied().unwrap_or(0) {
                0 => missing.push(id),
                frame => {
                    let frame = &mut self.frames[frame as usize - 1];
                    (frame.used, frame.epoch) = (true, self.epoch);
                }
            }
        }
        self.found += (units.len() - missing.len()) as u64;
        self.loaded += missing.len() as u64;
        if missing.is_empty() {
            return Ok(());
        }
        let places: Vec<u32> = missing.iter().map(|_| self.take_frame()).collect();
        let buffer = |&place: &u32| std::mem::take(&mut self.frames[place as usize].data);
        let buffers: Vec<B> = places.iter().map(buffer).collect();
        let mut jobs: Vec<Job<B>> = missing.into_iter().zip(buffers).collect();
        let loaded = load(&mut jobs);
        for ((id, data), place) in jobs.into_iter().zip(places) {
            let frame = &mut self.frames[place as usize];
            frame.data = data;
            if loaded.is_err() {
                self.free.push(place);
                continue;
            }
            frame.owner = Some(id);
            frame.used = true;
            let table = &mut self.tables[id.unit];
            if table.len() <= id.record {
                table.resize((id.record + 1).max(2 * table.len()), 0);
            }
            table[id.record] = place + 1;
        }
        loaded
    }

    /// Gives up what is held of blocks from `record` on.
    pub fn forget_from(&mut self, record: usize) {
        for place in 0..self.frames.len() {
            if self.frames[place].owner.is_some_and(|owner| owner.record >= record) {
                self.release(place);
                self.free.push(place as u32);
            }
        }
    }

    /// A frame without an owner, which this call needs.
    fn take_frame(&mut self) -> u32 {
        let place = match self.free.pop() {
            Some(place) => place as usize,
            None if self.frames.len() < self.budget => self.grow(),
            None => match self.victim() {
                Some(place) => {
                    self.release(place);
                    place
                }
                None => self.grow(),
            },
        };
        self.frames[place].epoch = self.epoch;
        place as u32
    }

    fn grow(&mut self) -> usize {
        let data = B::new(self.elements, self.frames.len());
        self.frames.push(Frame { data, owner: None, used: false, epoch: 0 });
        self.frames.len() - 1
    }

    /// The next frame that was not used since the hand came by, and that this call does not need. The hand goes around twice: the first time
    /// may only take marks away.
    fn victim(&mut self) -> Option<usize> {
        for _ in 0..2 * self.frames.len() {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.frames.len();
            let frame = &mut self.frames[place];
            if frame.epoch == self.epoch {
                continue;
            }
            if !std::mem::take(&mut frame.used) {
                return Some(place);
            }
        }
        None
    }

    fn release(&mut self, place: usize) {
        if let Some(owner) = self.frames[place].owner.take() {
            self.tables[owner.unit][owner.record] = 0;
        }
    }

    /// Back to the budget.
    fn shrink(&mut self) {
        if self.frames.len() <= self.budget {
            return;
        }
        for place in self.budget..self.frames.len() {
            self.release(place);
        }
        self.frames.truncate(self.budget);
        self.free.retain(|&place| (place as usize) < self.budget);
        self.hand = 0;
    }
}

/// The units that are side by side in a block, which are read at once.
pub fn side_by_side<B>(jobs: &mut [Job<B>]) -> Vec<&mut [Job<B>]> {
    jobs.chunk_by_mut(|(a, _), (b, _)| a.record == b.record && a.unit + 1 == b.unit).collect()
}

/// Which of some things were met, without a list to be emptied: those that bear the number of now.
#[derive(Debug, Default)]
pub struct Seen {
    marks: Vec<u32>,
    now: u32,
}

impl Seen {
    /// One whose number soon begins anew.
    #[cfg(test)]
    pub fn late() -> Self {
        Self { marks: Vec::new(), now: u32::MAX - 2 }
    }

    /// Nothing was met, of so many.
    pub fn clear(&mut self, of: usize) {
        self.now = self.now.wrapping_add(1);
        if self.now == 0 {
            self.marks.fill(0);
            self.now = 1;
        }
        if self.marks.len() < of {
            self.marks.resize(of.max(2 * self.marks.len()), 0);
        }
    }

    /// Whether it is met for the first time.
    pub fn is_new(&mut self, i: usize) -> bool {
        std::mem::replace(&mut self.marks[i], self.now) != self.now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a unit holds.
    fn content(id: UnitId) -> f32 {
        (id.record * 10 + id.unit) as f32
    }

    proptest! {
        /// Whatever is asked for, it is there, and frames are no more than the budget or what one call needs.
        #[test]
        fn what_is_held_is_there(
            budget in 0usize..8,
            calls in proptest::collection::vec((proptest::collection::btree_set((0usize..12, 0usize..3), 0..12), 0u8..8), 1..30),
        ) {
            let mut frames: Frames = Frames::new(3, 4, budget * 16);
            for (units, kind) in calls {
                let units: Vec<UnitId> = units.into_iter().map(|(record, unit)| UnitId { record, unit }).collect();
                let mut loads = 0;
                let held = frames.hold(&units, |jobs| {
                    loads = jobs.len();
                    if kind == 0 {
                        return Err(crate::Error::Candle(candle_core::Error::Msg("unreadable".into())));
                    }
                    jobs.iter_mut().for_each(|(id, data)| data.fill(content(*id)));
                    Ok(())
                });
                prop_assert_eq!(held.is_err(), kind == 0 && loads > 0);
                prop_assert!(frames.bytes() <= 16 * budget.max(units.len()));
                for id in units {
                    let got = frames.get(id.unit, id.record);
                    if held.is_ok() {
                        prop_assert_eq!(got.unwrap(), [[content(id); 2]; 2]);
                    } else if let Some(got) = got {
                        prop_assert_eq!(got, [[content(id); 2]; 2]);
                    }
                }
                if kind == 1 {
                    frames.forget_from(6);
                    prop_assert!((6..12).all(|record| (0..3).all(|unit| frames.get(unit, record).is_none())));
                }
            }
        }
    }

    #[test]
    fn what_is_used_stays() {
        let mut frames: Frames = Frames::new(1, 2, 3 * 8);
        let hold = |frames: &mut Frames, record| {
            let mut loads = 0;
            let id = UnitId { record, unit: 0 };
            frames
                .hold(&[id], |jobs| {
                    loads = jobs.len();
                    Ok(())
                })
                .unwrap();
            loads
        };
        let loads: usize = (0..40).map(|i| hold(&mut frames, 0) + hold(&mut frames, 1 + i)).sum();
        // The first block is read again and again, the others once.
        assert!(loads <= 40 + 3, "{loads}");
    }
}
