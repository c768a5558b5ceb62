//! Reads bytes as a script: numbers and byte strings, until the end.

/// Reads a script. Beyond its end all values are zero.
pub(crate) struct Script<'a> {
    rest: &'a [u8],
}

impl<'a> Script<'a> {
    pub(crate) const fn new(data: &'a [u8]) -> Self {
        Self { rest: data }
    }

    pub(crate) const fn is_over(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn u8(&mut self) -> u8 {
        let (first, rest) = self.rest.split_first().unwrap_or((&0, &[]));
        self.rest = rest;
        *first
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.u8()))
    }

    pub(crate) fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// One of `choices`.
    pub(crate) fn pick<T: Copy, const N: usize>(&mut self, choices: [T; N]) -> T {
        choices[usize::from(self.u8()) % N]
    }

    /// At most `len` bytes.
    pub(crate) fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        bytes
    }

    /// A byte string with its length (up to 255) before it.
    pub(crate) fn string(&mut self) -> &'a [u8] {
        let len = self.u8().into();
        self.bytes(len)
    }

    /// A record that is mostly well-formed: granule, start, a bitmap of a few words.
    pub(crate) fn record(&mut self, pages: u64) -> Vec<u8> {
        let shift = self.pick([12u64, 12, 21, 13, 16, 22, 30, 11, 31, 63]);
        let start = self.u64_up_to(pages) >> shift.saturating_sub(12).min(40)
            << shift.saturating_sub(12).min(40);
        let words = u64::from(self.u8() % 5);
        let mut bytes = (start | shift << 52 | words << 58).to_le_bytes().to_vec();
        for _ in 0..words {
            let word = self.pick([0, 1, u64::MAX, 1 << 63, 0x5555_5555_5555_5555, 0xff00]);
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }

    /// A number mostly below `end`.
    pub(crate) fn u64_up_to(&mut self, end: u64) -> u64 {
        match self.u16() {
            u16::MAX => self.u64() % (1 << 52),
            small => u64::from(small) % end.max(1),
        }
    }
}
