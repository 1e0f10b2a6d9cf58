//! Which rounded keys score best with a query.
//!
//! What is summed are integers, so all machines find the same scores, and equal keys have equal ones.

use super::rounded::{GROUP, Line, RoundedKeys, RoundedQueries, WORD};

/// Queries at most whose scores are found at once.
const TILE: usize = 8;
/// Groups whose scores have a bit each in one integer.
const BUNCH: usize = u64::BITS as usize / GROUP;

/// The instructions that scores are made of.
trait Products: Copy {
    /// Whether there are registers for the sums of eight queries and two groups: keys are then read half as often as for four.
    const EIGHT: bool;

    /// The sums of products of a query with the keys of a group.
    type Sums: Copy;

    /// Those of `Q` queries and `G` groups, a line for each word of a query, less the queries' `surplus`.
    fn products<const Q: usize, const G: usize>(
        self,
        groups: [&[Line]; G],
        queries: [&[i32]; Q],
        surplus: [i32; Q],
    ) -> [[Self::Sums; G]; Q];

    /// Scores, and a bit for each that reaches `bar`.
    fn scores(self, sums: Self::Sums, factors: &Line, bar: f32) -> ([f32; GROUP], u16);

    /// A bit for each score that reaches `bar`.
    fn reach(self, scores: &[f32; GROUP], bar: f32) -> u16;

    /// The larger of each two.
    fn larger(self, a: &[f32; GROUP], b: &[f32; GROUP]) -> [f32; GROUP];
}

/// Any machine.
#[derive(Clone, Copy)]
struct Portable;

impl Products for Portable {
    const EIGHT: bool = false;

    type Sums = [i32; GROUP];

    #[inline(always)]
    fn products<const Q: usize, const G: usize>(
        self,
        groups: [&[Line]; G],
        queries: [&[i32]; Q],
        surplus: [i32; Q],
    ) -> [[[i32; GROUP]; G]; Q] {
        let mut sums = surplus.map(|surplus| [[-surplus; GROUP]; G]);
        for word in 0..queries[0].len() {
            for (g, lines) in groups.iter().enumerate() {
                let keys = lines[word].0.as_chunks::<WORD>().0;
                for (sums, query) in sums.iter_mut().zip(queries) {
                    let query = query[word].to_le_bytes().map(|byte| i32::from(byte.cast_signed()));
                    for (sum, key) in sums[g].iter_mut().zip(keys) {
                        *sum += (0..WORD).map(|i| query[i] * i32::from(key[i])).sum::<i32>();
                    }
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn scores(self, sums: [i32; GROUP], factors: &Line, bar: f32) -> ([f32; GROUP], u16) {
        let scores: [f32; GROUP] = {
            let factors = factors.factors();
            std::array::from_fn(|i| sums[i] as f32 * factors[i])
        };
        (scores, self.reach(&scores, bar))
    }

    #[inline(always)]
    fn reach(self, scores: &[f32; GROUP], bar: f32) -> u16 {
        if !scores.iter().fold(false, |any, &score| any | (score >= bar)) {
            return 0;
        }
        scores.iter().enumerate().fold(0, |bits, (i, &score)| bits | u16::from(score >= bar) << i)
    }

    #[inline(always)]
    fn larger(self, a: &[f32; GROUP], b: &[f32; GROUP]) -> [f32; GROUP] {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
}

/// Machines with AVX-512 and its products of bytes.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Vnni;

#[cfg(target_arch = "x86_64")]
impl Products for Vnni {
    const EIGHT: bool = true;

    type Sums = std::arch::x86_64::__m512i;

    #[inline(always)]
    fn products<const Q: usize, const G: usize>(
        self,
        groups: [&[Line]; G],
        queries: [&[i32]; Q],
        surplus: [i32; Q],
    ) -> [[Self::Sums; G]; Q] {
        use std::arch::x86_64::{_mm512_dpbusd_epi32, _mm512_load_si512, _mm512_set1_epi32};
        let words = queries[0].len();
        let (groups, queries) = (groups.map(|lines| &lines[..words]), queries.map(|query| &query[..words]));
        // SAFETY: only `scan_vnni` comes here, on machines that have these instructions; the slices were cut to what is read, and a line is
        // aligned as a register.
        unsafe {
            let mut sums = surplus.map(|surplus| [_mm512_set1_epi32(-surplus); G]);
            for word in 0..words {
                let keys = groups.map(|lines| _mm512_load_si512(lines.as_ptr().add(word).cast()));
                for (sums, query) in sums.iter_mut().zip(queries) {
                    let query = _mm512_set1_epi32(*query.get_unchecked(word));
                    for (sum, keys) in sums.iter_mut().zip(keys) {
                        *sum = _mm512_dpbusd_epi32(*sum, keys, query);
                    }
                }
            }
            sums
        }
    }

    #[inline(always)]
    fn scores(self, sums: Self::Sums, factors: &Line, bar: f32) -> ([f32; GROUP], u16) {
        use std::arch::x86_64::{
            _CMP_GE_OQ, _mm512_cmp_ps_mask, _mm512_cvtepi32_ps, _mm512_load_ps, _mm512_mul_ps, _mm512_set1_ps,
        };
        // SAFETY: as above; a register is as long as a line, and as the scores of a group.
        unsafe {
            let sums = _mm512_cvtepi32_ps(sums);
            let scores = _mm512_mul_ps(sums, _mm512_load_ps(factors.0.as_ptr().cast()));
            let reach = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(scores, _mm512_set1_ps(bar));
            (std::mem::transmute::<std::arch::x86_64::__m512, [f32; GROUP]>(scores), reach)
        }
    }

    #[inline(always)]
    fn reach(self, scores: &[f32; GROUP], bar: f32) -> u16 {
        use std::arch::x86_64::{_CMP_GE_OQ, _mm512_cmp_ps_mask, _mm512_loadu_ps, _mm512_set1_ps};
        // SAFETY: as above.
        unsafe { _mm512_cmp_ps_mask::<_CMP_GE_OQ>(_mm512_loadu_ps(scores.as_ptr()), _mm512_set1_ps(bar)) }
    }

    #[inline(always)]
    fn larger(self, a: &[f32; GROUP], b: &[f32; GROUP]) -> [f32; GROUP] {
        use std::arch::x86_64::{__m512, _mm512_loadu_ps, _mm512_max_ps};
        // SAFETY: as above.
        unsafe {
            let larger = _mm512_max_ps(_mm512_loadu_ps(a.as_ptr()), _mm512_loadu_ps(b.as_ptr()));
            std::mem::transmute::<__m512, [f32; GROUP]>(larger)
        }
    }
}

/// What some queries score with some groups of keys.
struct Tile<'a, P: Products, const Q: usize, const G: usize> {
    products: P,
    queries: [u32; Q],
    /// The first group.
    group: usize,
    sums: [[P::Sums; G]; Q],
    factors: [&'a Line; G],
}

impl<P: Products, const Q: usize, const G: usize> Tile<'_, P, Q, G> {
    /// The scores of a query with a group, and a bit for each that reaches `bar`.
    #[inline(always)]
    fn scores(&self, query: usize, group: usize, bar: f32) -> ([f32; GROUP], u16) {
        self.products.scores(self.sums[query][group], self.factors[group], bar)
    }
}

/// Who takes scores.
trait Visit {
    /// The scores of a tile. A query meets groups in their order.
    fn tile<P: Products, const Q: usize, const G: usize>(&mut self, tile: Tile<P, Q, G>);

    /// All scores of a query, the `i`-th of a tile, were told.
    #[inline(always)]
    fn done(&mut self, _products: impl Products, _i: usize, _query: u32) {}
}

/// Queries that look at keys.
struct Scan<'a, V> {
    keys: &'a RoundedKeys,
    queries: &'a RoundedQueries,
    some: &'a [u32],
    visit: &'a mut V,
}

impl<V: Visit> Scan<'_, V> {
    /// With the instructions that the machine has.
    fn run(self) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512vnni") {
                // SAFETY: the machine has these instructions.
                return unsafe { scan_vnni(self) };
            }
            if has!("avx2") {
                // SAFETY: the machine has these instructions.
                return unsafe { scan_avx2(self) };
            }
        }
        self.run_with(Portable);
    }

    #[inline(always)]
    fn run_with<P: Products>(mut self, products: P) {
        if P::EIGHT {
            let (eights, rest) = self.some.as_chunks();
            for &queries in eights {
                self.rows::<8, 2>(products, queries);
            }
            // A list is often read for a few queries: sums of all at once hide how long a product takes.
            match *rest {
                [a, b, c, d, e, f, g] => self.rows::<7, 2>(products, [a, b, c, d, e, f, g]),
                [a, b, c, d, e, f] => self.rows::<6, 2>(products, [a, b, c, d, e, f]),
                [a, b, c, d, e] => self.rows::<5, 2>(products, [a, b, c, d, e]),
                [a, b, c, d] => self.rows::<4, 2>(products, [a, b, c, d]),
                [a, b, c] => self.rows::<3, 2>(products, [a, b, c]),
                [a, b] => self.rows::<2, 4>(products, [a, b]),
                [a] => self.rows::<1, 4>(products, [a]),
                _ => {}
            }
        } else {
            let (fours, ones) = self.some.as_chunks();
            for &queries in fours {
                self.rows::<4, 2>(products, queries);
            }
            for &query in ones {
                self.rows::<1, 4>(products, [query]);
            }
        }
    }

    /// All keys for these queries, `G` groups at once.
    #[inline(always)]
    fn rows<const Q: usize, const G: usize>(&mut self, products: impl Products, queries: [u32; Q]) {
        let (groups, size) = (self.keys.len().div_ceil(GROUP), self.keys.lines_of_group());
        let words = queries.map(|query| &self.queries.words[query as usize * (size - 1)..][..size - 1]);
        let surplus = queries.map(|query| self.queries.surplus[query as usize]);
        // Loops and no closures: what is called here has to be compiled for the machine's instructions, within `scan_vnni`.
        let mut group = 0;
        while group + G <= groups {
            self.tile::<Q, G>(products, queries, words, surplus, group);
            group += G;
        }
        while group + 2 <= groups {
            self.tile::<Q, 2>(products, queries, words, surplus, group);
            group += 2;
        }
        while group < groups {
            self.tile::<Q, 1>(products, queries, words, surplus, group);
            group += 1;
        }
        for (i, query) in queries.into_iter().enumerate() {
            self.visit.done(products, i, query);
        }
    }

    #[inline(always)]
    fn tile<const Q: usize, const G: usize>(
        &mut self,
        products: impl Products,
        queries: [u32; Q],
        words: [&[i32]; Q],
        surplus: [i32; Q],
        group: usize,
    ) {
        let size = self.keys.lines_of_group();
        let groups: [usize; G] = std::array::from_fn(|g| group + g);
        let lines = groups.map(|group| &self.keys.lines[group * size..][..size]);
        let (sums, factors) = (products.products(lines, words, surplus), lines.map(|lines| &lines[size - 1]));
        self.visit.tile(Tile { products, queries, group, sums, factors });
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn scan_vnni<V: Visit>(scan: Scan<V>) {
    scan.run_with(Vnni);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn scan_avx2<V: Visit>(scan: Scan<V>) {
    scan.run_with(Portable);
}

/// Offers what reaches a bar, which rises.
struct Offers<'a, F> {
    bars: &'a mut [f32],
    offer: F,
}

impl<F: FnMut(usize, usize, f32) -> f32> Visit for Offers<'_, F> {
    #[inline(always)]
    fn tile<P: Products, const Q: usize, const G: usize>(&mut self, tile: Tile<P, Q, G>) {
        for (i, query) in tile.queries.into_iter().enumerate() {
            let bar = &mut self.bars[query as usize];
            for g in 0..G {
                let (scores, mut bits) = tile.scores(i, g, *bar);
                // Most keys are not among the best of any query.
                while bits > 0 {
                    let at = bits.trailing_zeros() as usize;
                    bits &= bits - 1;
                    if scores[at] >= *bar {
                        *bar = (self.offer)(query as usize, (tile.group + g) * GROUP + at, scores[at]);
                    }
                }
            }
        }
    }
}

/// Scores all keys for `some` of the queries. `offer` is told query, key and score of those that reach the query's bar, in the order of keys, and gives its
/// new bar.
pub fn scan(
    keys: &RoundedKeys,
    queries: &RoundedQueries,
    some: &[u32],
    bars: &mut [f32],
    offer: impl FnMut(usize, usize, f32) -> f32,
) {
    Scan { keys, queries, some, visit: &mut Offers { bars, offer } }.run();
}

/// All scores of the queries of a tile, and the best of each.
struct All<F> {
    limit: usize,
    groups: usize,
    parts: usize,
    /// `[queries, groups]`
    scores: Vec<[f32; GROUP]>,
    /// `[queries, parts]`: the largest of each part of the scores.
    largest: Vec<[f32; GROUP]>,
    /// Memory to work in: bunches of groups that have scores which reach something, with a bit for each.
    reached: Vec<(usize, u64)>,
    /// Memory to work in: these scores, see [`pack`].
    found: Vec<u64>,
    tell: F,
}

impl<F: FnMut(u32, u32)> Visit for All<F> {
    #[inline(always)]
    fn tile<P: Products, const Q: usize, const G: usize>(&mut self, tile: Tile<P, Q, G>) {
        let rows = self.scores.chunks_exact_mut(self.groups).zip(self.largest.chunks_exact_mut(self.parts));
        for (i, (scores, largest)) in (0..Q).zip(rows) {
            for (g, to) in scores[tile.group..][..G].iter_mut().enumerate() {
                let largest = &mut largest[(tile.group + g) & (self.parts - 1)];
                (*to, _) = tile.scores(i, g, f32::INFINITY);
                *largest = tile.products.larger(to, largest);
            }
        }
    }

    #[inline(always)]
    fn done(&mut self, products: impl Products, i: usize, query: u32) {
        let largest = &mut self.largest[i * self.parts..][..self.parts];
        let bar = reached_by(largest, self.limit);
        largest.fill([f32::NEG_INFINITY; GROUP]);
        let scores = &self.scores[i * self.groups..][..self.groups];
        // First the few bunches that have some, without a branch that nobody foresees.
        let mut bunches = 0;
        for (bunch, groups) in scores.as_chunks::<BUNCH>().0.iter().enumerate() {
            let mut bits = 0;
            for (i, scores) in groups.iter().enumerate() {
                bits |= u64::from(products.reach(scores, bar)) << (GROUP * i);
            }
            self.reached[bunches] = (bunch, bits);
            bunches += usize::from(bits > 0);
        }
        let (scores, mut n) = (scores.as_flattened(), 0);
        for &(bunch, mut bits) in &self.reached[..bunches] {
            while bits > 0 {
                let at = bunch * BUNCH * GROUP + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                self.found[n] = pack(scores[at], at as u32);
                n += 1;
            }
        }
        // A few too many; many, where scores are equal.
        if n > 2 * self.limit {
            self.found[..n].select_nth_unstable_by(self.limit - 1, |a, b| b.cmp(a));
            n = self.limit;
        }
        while n > self.limit {
            let worst = self.found[..n].iter().fold(u64::MAX, |worst, &found| worst.min(found));
            n -= 1;
            let last = self.found[n];
            self.found[..n].iter_mut().filter(|found| **found == worst).for_each(|found| *found = last);
        }
        self.found[..n].iter().for_each(|&found| (self.tell)(query, unpack(found).1));
    }
}

/// The `limit` best keys of each query, or all if there are no more, in any order; of equals the first. `tell` is given query and key.
pub fn best(keys: &RoundedKeys, queries: &RoundedQueries, limit: usize, tell: impl FnMut(u32, u32)) {
    let groups = keys.len().div_ceil(GROUP).next_multiple_of(BUNCH);
    // The largest of four times as many parts of the scores as are asked for tell what the best ones reach; little else does.
    let parts = limit.div_ceil(4).next_power_of_two();
    let some: Vec<u32> = (0..queries.surplus.len() as u32).collect();
    let rows = TILE.min(some.len());
    let (scores, largest) = (vec![[f32::NAN; GROUP]; rows * groups], vec![[f32::NEG_INFINITY; GROUP]; rows * parts]);
    let visit = &mut All {
        limit,
        groups,
        parts,
        scores,
        largest,
        reached: vec![(0, 0); groups / BUNCH],
        found: vec![0; groups * GROUP],
        tell,
    };
    Scan { keys, queries, some: &some, visit }.run();
}

/// A score as an integer that is larger if the score is.
#[inline(always)]
fn ordered(score: f32) -> i32 {
    let bits = score.to_bits().cast_signed();
    bits ^ (bits >> 31 & i32::MAX)
}

/// The score of an integer.
#[inline(always)]
fn score_of(ordered: i32) -> f32 {
    f32::from_bits((ordered ^ (ordered >> 31 & i32::MAX)).cast_unsigned())
}

/// A score and its number as an integer that is larger if the score is, or of equals if the number is smaller; never 0.
#[inline(always)]
pub fn pack(score: f32, number: u32) -> u64 {
    u64::from(ordered(score).cast_unsigned() ^ 1 << 31) << 32 | u64::from(!number)
}

/// The score and the number that were packed.
#[inline(always)]
pub fn unpack(packed: u64) -> (f32, u32) {
    (score_of(((packed >> 32) as u32 ^ 1 << 31).cast_signed()), !(packed as u32))
}

/// What at least `n` of the scores reach, and not many more.
#[inline(always)]
fn reached_by(scores: &[[f32; GROUP]], n: usize) -> f32 {
    let scores = scores.as_flattened();
    let low = scores.iter().fold(i32::MAX, |low, &score| low.min(ordered(score)));
    let high = scores.iter().fold(i32::MIN, |high, &score| high.max(ordered(score)));
    let (mut low, mut high) = (i64::from(low), i64::from(high));
    // A number that enough of them reach, and one that may be too large, draw near.
    for _ in 0..8 {
        let middle = (low + high + 1) / 2;
        let reach = scores.iter().map(|&score| i32::from(ordered(score) >= middle as i32)).sum::<i32>() as usize;
        if reach < n {
            high = middle;
        } else {
            low = middle;
            if reach < n + n / 8 + 1 {
                break;
            }
        }
    }
    score_of(low as i32)
}

#[cfg(test)]
mod tests {
    use super::super::rounded::factors;
    use super::*;

    /// Numbers between -1 and 1 that repeat after a long time.
    fn numbers(n: usize, mut state: u64) -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.
        };
        (0..n).map(|_| next()).collect()
    }

    /// Whatever instructions this machine has find what any machine finds, to the bit, and it is near what the numbers are.
    #[test]
    fn all_machines_find_the_same() {
        for (d, keys, queries) in [(64, 70, 9), (64, 16, 1), (6, 33, 4), (7, 1, 3), (128, 100, 6), (40, 15, 13)] {
            let (origin, rows) = (numbers(d, 3), numbers(keys * d, 1));
            let query_rows: Vec<f32> = numbers(queries * d, 2).iter().map(|x| 5. * x).collect();
            let mut all = RoundedKeys::new(d);
            rows.chunks(d).for_each(|key| all.push(key, &origin));
            let rounded = RoundedQueries::new(&query_rows, d);
            let some: Vec<u32> = (0..queries as u32).filter(|query| query % 5 != 2).collect();
            let mut scores = vec![vec![0.; keys]; queries];
            for bar in [f32::NEG_INFINITY, 40.] {
                let (mut here, mut anywhere) = (Vec::new(), Vec::new());
                scan(&all, &rounded, &some, &mut vec![bar; queries], |query, key, score| {
                    here.push((query, key, score.to_bits()));
                    bar
                });
                let offer = |query, key, score: f32| {
                    anywhere.push((query, key, score.to_bits()));
                    bar
                };
                let visit = &mut Offers { bars: &mut vec![bar; queries], offer };
                Scan { keys: &all, queries: &rounded, some: &some, visit }.run_with(Portable);
                // Each query meets keys in their order; queries come as machines take them together.
                [&mut here, &mut anywhere].into_iter().for_each(|told| told.sort_by_key(|&(query, ..)| query));
                assert!(here == anywhere);
                if bar < 0. {
                    assert_eq!(here.len(), some.len() * keys, "each key once for each query");
                }
                for (query, key, score) in here {
                    let score = f32::from_bits(score);
                    scores[query][key] = score;
                    assert!(some.contains(&(query as u32)));
                    let (q, k) = (&query_rows[query * d..][..d], &rows[key * d..][..d]);
                    let (factor, _) = factors(q.iter().copied());
                    let exact: f32 = q.iter().zip(k).zip(&origin).map(|((q, k), origin)| q * (k - origin)).sum();
                    let off = (score * factor - exact).abs();
                    assert!(off < 0.02 * 5. * (d as f32).sqrt(), "{off} of {exact}");
                }
            }
            for limit in [1, 3, 16, 48] {
                let mut told = vec![Vec::new(); queries];
                best(&all, &rounded, limit, |query, key| told[query as usize].push(key as usize));
                for query in some.iter().map(|&query| query as usize) {
                    let mut expected: Vec<usize> = (0..keys).collect();
                    expected.sort_by(|&a, &b| scores[query][b].total_cmp(&scores[query][a]));
                    expected.truncate(limit);
                    expected.sort_unstable();
                    told[query].sort_unstable();
                    assert_eq!(told[query], expected);
                }
            }
        }
    }
}
