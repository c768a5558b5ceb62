//! 512 bits in eight words: one chunk's pages, or one slab's chunks.

const WORDS: usize = 8;

/// Number of bits, as an index bound.
pub(crate) const BITS: usize = WORDS * 64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Bits512([u64; WORDS]);

impl Bits512 {
    pub(crate) const EMPTY: Self = Self([0; WORDS]);
    pub(crate) const FULL: Self = Self([u64::MAX; WORDS]);

    /// Bits `start..end`; both are clamped to 512.
    pub(crate) fn range(start: usize, end: usize) -> Self {
        below(end).and_not(below(start))
    }

    /// Word `index` (0..8) set to `word`, the rest zero.
    pub(crate) fn with_word(index: usize, word: u64) -> Self {
        let mut bits = Self::EMPTY;
        bits.or_word(index, word);
        bits
    }

    pub(crate) fn or_word(&mut self, index: usize, word: u64) {
        self.0[index % WORDS] |= word;
    }

    pub(crate) fn get(&self, bit: usize) -> bool {
        self.0[(bit / 64) % WORDS] >> (bit % 64) & 1 == 1
    }

    pub(crate) fn set(&mut self, bit: usize) {
        self.0[(bit / 64) % WORDS] |= 1 << (bit % 64);
    }

    pub(crate) fn assign(&mut self, bit: usize, value: bool) {
        let word = &mut self.0[(bit / 64) % WORDS];
        *word = *word & !(1 << (bit % 64)) | u64::from(value) << (bit % 64);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.0.iter().all(|&word| word == u64::MAX)
    }

    pub(crate) fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Number of set bits below `bit`: the index of a chunk's bitmap.
    pub(crate) fn rank(&self, bit: usize) -> usize {
        let whole = (bit / 64).min(WORDS);
        let mut ones: u32 = self.0[..whole].iter().map(|word| word.count_ones()).sum();
        if let Some(word) = self.0.get(whole) {
            ones += (word & ((1 << (bit % 64)) - 1)).count_ones();
        }
        ones as usize
    }

    /// The first set bit at or after `from`.
    pub(crate) fn next_set(&self, from: usize) -> Option<usize> {
        let first = from / 64;
        let head = self.0.get(first)? & (u64::MAX << (from % 64));
        if head != 0 {
            return Some(first * 64 + head.trailing_zeros() as usize);
        }
        let (skip, word) =
            self.0.iter().enumerate().skip(first + 1).find(|&(_, &word)| word != 0)?;
        Some(skip * 64 + word.trailing_zeros() as usize)
    }

    /// The first clear bit at or after `from`, 512 if there is none.
    pub(crate) fn next_clear(&self, from: usize) -> usize {
        self.not().next_set(from).unwrap_or(BITS)
    }

    /// The set bits, lowest first.
    pub(crate) fn ones(self) -> impl Iterator<Item = usize> {
        let mut next = 0;
        core::iter::from_fn(move || {
            let bit = self.next_set(next)?;
            next = bit + 1;
            Some(bit)
        })
    }

    /// The runs of set bits, lowest first, as `(start, end)`.
    pub(crate) fn next_run(&self, from: usize) -> Option<(usize, usize)> {
        let start = self.next_set(from)?;
        Some((start, self.next_clear(start)))
    }

    /// The `count` lowest set bits (all of them if there are fewer).
    pub(crate) fn lowest(&self, count: u64) -> Self {
        let mut left = count;
        let mut out = Self::EMPTY;
        for (to, &word) in out.0.iter_mut().zip(&self.0) {
            let ones = u64::from(word.count_ones());
            if ones <= left {
                *to = word;
                left -= ones;
                continue;
            }
            let mut rest = word;
            for _ in 0..left {
                rest &= rest - 1;
            }
            *to = word & !rest;
            break;
        }
        out
    }

    pub(crate) fn or(self, other: Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    pub(crate) fn and(self, other: Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    pub(crate) fn and_not(self, other: Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    fn not(self) -> Self {
        Self(self.0.map(|word| !word))
    }

    fn zip(mut self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        for (a, b) in self.0.iter_mut().zip(other.0) {
            *a = f(*a, b);
        }
        self
    }
}

/// Bits `0..end`.
fn below(end: usize) -> Bits512 {
    let mut bits = Bits512::EMPTY;
    let whole = (end / 64).min(WORDS);
    bits.0[..whole].fill(u64::MAX);
    if let Some(word) = bits.0.get_mut(whole) {
        *word = (1 << (end % 64)) - 1;
    }
    bits
}
