//! Just enough gRPC for the echo service: unary messages with one string field, written out by hand.
//!
//! `proto.EchoTestService/Echo` takes and returns a message whose field 1 is a string.

use bytes::{BufMut as _, Bytes, BytesMut};

/// Path of the method.
pub(super) const ECHO: &str = "/proto.EchoTestService/Echo";
/// Path of the health check.
pub(super) const HEALTH: &str = "/grpc.health.v1.Health/Check";

fn varint(mut value: u64, out: &mut BytesMut) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn read_varint(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = input.split_first()?;
        *input = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// A message in its frame: uncompressed, length, field 1.
pub(super) fn frame(text: &str) -> Bytes {
    let mut message = BytesMut::new();
    message.put_u8(0x0a);
    varint(text.len() as u64, &mut message);
    message.extend_from_slice(text.as_bytes());
    let mut out = BytesMut::new();
    out.put_u8(0);
    out.put_u32(message.len() as u32);
    out.extend_from_slice(&message);
    out.freeze()
}

/// The health check's `SERVING`.
pub(super) fn serving() -> Bytes {
    Bytes::from_static(&[0, 0, 0, 0, 2, 0x08, 1])
}

/// Field 1 of a framed message; `None` if it isn't one.
pub(super) fn unframe(frame: &[u8]) -> Option<String> {
    let (head, body) = frame.split_at_checked(5)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let mut rest = body.get(..length).filter(|_| head[0] == 0)?;
    let mut text = String::new();
    while !rest.is_empty() {
        let tag = read_varint(&mut rest)?;
        match tag & 7 {
            0 => {
                read_varint(&mut rest)?;
            }
            2 => {
                let length = usize::try_from(read_varint(&mut rest)?).ok()?;
                let (value, after) = rest.split_at_checked(length)?;
                if tag >> 3 == 1 {
                    text = String::from_utf8_lossy(value).into_owned();
                }
                rest = after;
            }
            1 => rest = rest.get(8..)?,
            5 => rest = rest.get(4..)?,
            _ => return None,
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_framed_is_read_back_and_garbage_is_refused() {
        for text in ["", "a", &"long ".repeat(1000)] {
            assert_eq!(unframe(&frame(text)).as_deref(), Some(text));
        }
        // Other fields are skipped.
        assert_eq!(unframe(&[0, 0, 0, 0, 5, 0x10, 7, 0x0a, 1, b'x']).as_deref(), Some("x"));
        for bad in [&[][..], &[0, 0, 0, 0, 9, 1], &[1, 0, 0, 0, 0], &[0, 0, 0, 0, 2, 0x0a, 200], &[0, 0, 0, 0, 1, 0xff]] {
            assert_eq!(unframe(bad), None, "{bad:?}");
        }
    }
}
