//! Decompression of the header blocks of SPDY (RFC 1950 and 1951, one stream over all blocks of a connection).
//!
//! Small on purpose: a block is a few hundred bytes of a stream's headers. It is untrusted input: every error ends the
//! connection, and a block can't grow beyond [`LIMIT`].

/// The most that one block may hold, decompressed.
const LIMIT: usize = 64 * 1024;
/// How far back a reference may point.
const WINDOW: usize = 32 * 1024;

/// Why a block can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken(pub &'static str);

/// A zlib stream that is read block by block; between blocks the writer has flushed, so that a block ends on a byte.
pub(super) struct Inflate {
    dictionary: Vec<u8>,
    window: Vec<u8>,
    started: bool,
}

struct Bits<'a> {
    input: &'a [u8],
    hold: u32,
    count: u32,
}

impl Bits<'_> {
    fn take(&mut self, n: u32) -> Result<u32, Broken> {
        while self.count < n {
            let (first, rest) = self.input.split_first().ok_or(Broken("the block ends in the middle"))?;
            self.hold |= u32::from(*first) << self.count;
            self.count += 8;
            self.input = rest;
        }
        let value = self.hold & ((1 << n) - 1);
        self.hold >>= n;
        self.count -= n;
        Ok(value)
    }

    fn align(&mut self) {
        self.hold = 0;
        self.count = 0;
    }
}

/// A Huffman code: how many codes there are of each length, and the symbols in order of their codes.
struct Code {
    counts: [u16; 16],
    symbols: Vec<u16>,
}

impl Code {
    fn new(lengths: &[u8]) -> Result<Self, Broken> {
        let mut counts = [0_u16; 16];
        for &length in lengths {
            counts[usize::from(length)] += 1;
        }
        let mut left = 1_i32;
        for &count in &counts[1..] {
            left = (left << 1) - i32::from(count);
            if left < 0 {
                return Err(Broken("a code is over-subscribed"));
            }
        }
        let mut symbols = Vec::with_capacity(lengths.len());
        for length in 1..16_u8 {
            symbols.extend(lengths.iter().zip(0_u16..).filter(|(l, _)| **l == length).map(|(_, symbol)| symbol));
        }
        counts[0] = 0;
        Ok(Self { counts, symbols })
    }

    fn read(&self, bits: &mut Bits<'_>) -> Result<usize, Broken> {
        let (mut code, mut first, mut index) = (0_i32, 0_i32, 0_i32);
        for &count in &self.counts[1..] {
            code |= i32::try_from(bits.take(1)?).unwrap_or(0);
            let count = i32::from(count);
            if code - count < first {
                let at = usize::try_from(index + code - first).map_err(|_| Broken("no such code"))?;
                return self.symbols.get(at).map(|s| usize::from(*s)).ok_or(Broken("no such code"));
            }
            index += count;
            first = (first + count) << 1;
            code <<= 1;
        }
        Err(Broken("no such code"))
    }
}

const LENGTH_BASE: [u16; 29] =
    [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
const LENGTH_EXTRA: [u8; 29] = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
const DISTANCE_BASE: [u16; 30] = [
    1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193,
    12289, 16385, 24577,
];
const DISTANCE_EXTRA: [u8; 30] =
    [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13];
const LENGTH_ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

impl Inflate {
    /// A stream whose writer may refer to this dictionary.
    pub(super) fn new(dictionary: Vec<u8>) -> Self {
        Self { dictionary, window: Vec::new(), started: false }
    }

    /// The next block, decompressed.
    pub(super) fn block(&mut self, mut input: &[u8]) -> Result<Vec<u8>, Broken> {
        if !self.started {
            let [method, flags, rest @ ..] = input else { return Err(Broken("there is no zlib header")) };
            if method & 0x0f != 8 || (u16::from(*method) << 8 | u16::from(*flags)) % 31 != 0 {
                return Err(Broken("the zlib header is wrong"));
            }
            input = rest;
            if flags & 0x20 != 0 {
                input = input.get(4..).ok_or(Broken("there is no dictionary checksum"))?;
                self.window = std::mem::take(&mut self.dictionary);
            }
            self.started = true;
        }
        let start = self.window.len();
        let mut bits = Bits { input, hold: 0, count: 0 };
        while !bits.input.is_empty() {
            let last = bits.take(1)? == 1;
            match bits.take(2)? {
                0 => self.stored(&mut bits, start)?,
                1 => {
                    let mut lengths = [8_u8; 288];
                    lengths[144..256].fill(9);
                    lengths[256..280].fill(7);
                    self.compressed(&mut bits, start, &Code::new(&lengths)?, &Code::new(&[5; 30])?)?;
                }
                2 => {
                    let (literals, distances) = tables(&mut bits)?;
                    self.compressed(&mut bits, start, &literals, &distances)?;
                }
                _ => return Err(Broken("no such kind of block")),
            }
            if last {
                break;
            }
        }
        let out = self.window[start..].to_vec();
        let surplus = self.window.len().saturating_sub(WINDOW);
        self.window.drain(..surplus);
        Ok(out)
    }

    fn push(&mut self, start: usize, byte: u8) -> Result<(), Broken> {
        if self.window.len() - start >= LIMIT {
            return Err(Broken("the block is too large"));
        }
        self.window.push(byte);
        Ok(())
    }

    fn stored(&mut self, bits: &mut Bits<'_>, start: usize) -> Result<(), Broken> {
        bits.align();
        let [a, b, c, d, rest @ ..] = bits.input else { return Err(Broken("the block ends in the middle")) };
        let length = usize::from(u16::from_le_bytes([*a, *b]));
        if u16::from_le_bytes([*a, *b]) != !u16::from_le_bytes([*c, *d]) || rest.len() < length {
            return Err(Broken("the length of a stored block is wrong"));
        }
        for byte in &rest[..length] {
            self.push(start, *byte)?;
        }
        bits.input = &rest[length..];
        Ok(())
    }

    fn compressed(&mut self, bits: &mut Bits<'_>, start: usize, literals: &Code, distances: &Code) -> Result<(), Broken> {
        loop {
            let symbol = literals.read(bits)?;
            if let Ok(byte) = u8::try_from(symbol) {
                self.push(start, byte)?;
                continue;
            }
            if symbol == 256 {
                return Ok(());
            }
            let at = symbol - 257;
            let base = LENGTH_BASE.get(at).ok_or(Broken("no such length"))?;
            let length = u32::from(*base) + bits.take(u32::from(LENGTH_EXTRA[at]))?;
            let at = distances.read(bits)?;
            let base = DISTANCE_BASE.get(at).ok_or(Broken("no such distance"))?;
            let distance = u32::from(*base) + bits.take(u32::from(DISTANCE_EXTRA[at]))?;
            for _ in 0..length {
                let from = self.window.len().checked_sub(distance as usize).ok_or(Broken("a distance goes too far back"))?;
                let byte = self.window[from];
                self.push(start, byte)?;
            }
        }
    }
}

fn tables(bits: &mut Bits<'_>) -> Result<(Code, Code), Broken> {
    let literals = bits.take(5)? as usize + 257;
    let distances = bits.take(5)? as usize + 1;
    let count = bits.take(4)? as usize + 4;
    let mut lengths = [0_u8; 19];
    for &at in &LENGTH_ORDER[..count] {
        lengths[at] = bits.take(3)? as u8;
    }
    let code = Code::new(&lengths)?;
    let mut all: Vec<u8> = Vec::with_capacity(literals + distances);
    while all.len() < literals + distances {
        let (value, times) = match code.read(bits)? {
            symbol @ 0..=15 => (symbol as u8, 1),
            16 => (*all.last().ok_or(Broken("nothing to repeat"))?, 3 + bits.take(2)?),
            17 => (0, 3 + bits.take(3)?),
            _ => (0, 11 + bits.take(7)?),
        };
        all.extend(std::iter::repeat_n(value, times as usize));
    }
    if all.len() != literals + distances {
        return Err(Broken("the code lengths don't add up"));
    }
    Ok((Code::new(&all[..literals])?, Code::new(&all[literals..])?))
}
