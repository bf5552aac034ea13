//! As much of a DNS message as a forwarder has to understand: the header and where the questions end (RFC 1035, section 4.1).

/// Size of a header.
pub const HEADER: usize = 12;
const SERVFAIL: u8 = 2;
const NOTIMP: u8 = 4;
const REFUSED: u8 = 5;

/// The id.
pub fn id(message: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(message.get(..2)?.try_into().ok()?))
}

/// Changes the id. Does nothing to what is no message.
pub fn set_id(message: &mut [u8], id: u16) {
    if let Some(at) = message.get_mut(..2) {
        at.copy_from_slice(&id.to_be_bytes());
    }
}

/// Whether this can be a query: a whole header, and not marked as an answer.
pub fn is_query(message: &[u8]) -> bool {
    message.len() >= HEADER && message[2] & 0x80 == 0
}

/// Whether `answer` answers `query` but for the id: marked as an answer, the same kind of question, the same questions (in whatever case).
/// A refusal may leave the questions out, as servers do that could not read them.
pub fn answers(query: &[u8], answer: &[u8]) -> bool {
    if answer.len() < HEADER || answer[2] & 0x80 == 0 || (answer[2] ^ query[2]) & 0x78 != 0 {
        return false;
    }
    if questions(answer) == 0 {
        return answer[3] & 0x0f != 0 || questions(query) == 0;
    }
    let Some(end) = end_of_questions(query) else { return questions(query) == questions(answer) };
    questions(query) == questions(answer)
        && answer.get(HEADER..end).is_some_and(|those| those.eq_ignore_ascii_case(&query[HEADER..end]))
}

/// Whether another resolver may know better: SERVFAIL, NOTIMP, REFUSED.
pub fn is_refusal(answer: &[u8]) -> bool {
    answer.get(3).is_some_and(|byte| [SERVFAIL, NOTIMP, REFUSED].contains(&(byte & 0x0f)))
}

/// SERVFAIL as the answer to a query.
pub fn servfail(query: &[u8]) -> Vec<u8> {
    let end = end_of_questions(query).unwrap_or(HEADER);
    let mut answer = vec![0; HEADER];
    if query.len() < HEADER {
        return answer;
    }
    answer[..2].copy_from_slice(&query[..2]);
    // An answer, of the same kind of question, recursion as desired.
    answer[2] = 0x80 | query[2] & 0x79;
    // Recursion available.
    answer[3] = 0x80 | SERVFAIL;
    if end > HEADER {
        answer[4..6].copy_from_slice(&query[4..6]);
        answer.extend_from_slice(&query[HEADER..end]);
    }
    answer
}

fn questions(message: &[u8]) -> u16 {
    u16::from_be_bytes([message[4], message[5]])
}

/// Where the questions of a query end. None if they can't be read: cut off, or with compressed names, which nobody writes there.
fn end_of_questions(query: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    for _ in 0..u16::from_be_bytes(query.get(4..6)?.try_into().ok()?) {
        loop {
            match *query.get(at)? {
                0 => break,
                length @ 1..=63 => at += 1 + usize::from(length),
                _ => return None,
            }
        }
        // The root label, type and class.
        at += 5;
    }
    (at <= query.len()).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn query(name: &str) -> Vec<u8> {
        let mut message = vec![0xab, 0xcd, 0x01, 0x20, 0, 1, 0, 0, 0, 0, 0, 1];
        for label in name.split('.') {
            message.push(label.len() as u8);
            message.extend(label.as_bytes());
        }
        message.extend([0, 0, 1, 0, 1]);
        // OPT.
        message.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0]);
        message
    }

    fn answer(query: &[u8], code: u8) -> Vec<u8> {
        let mut answer = query.to_vec();
        answer[2] |= 0x80;
        answer[3] = 0x80 | code;
        answer
    }

    #[test]
    fn ids_change_and_nothing_else() {
        let (old, mut new) = (query("go-app.default.svc"), query("go-app.default.svc"));
        set_id(&mut new, 7);
        assert_eq!((id(&old), id(&new)), (Some(0xabcd), Some(7)));
        assert_eq!(old[2..], new[2..]);
    }

    #[test]
    fn an_answer_is_known_by_its_question() {
        let asked = query("a.example");
        assert!(is_query(&asked) && !is_query(&answer(&asked, 0)) && !is_query(&asked[..11]));
        assert!(answers(&asked, &answer(&asked, 0)));
        assert!(answers(&asked, &answer(&query("A.EXAMPLE"), 0)), "another case is the same name");
        assert!(!answers(&asked, &answer(&query("b.example"), 0)));
        assert!(!answers(&asked, &asked), "a query is no answer");
        let mut other = answer(&asked, 0);
        other[2] |= 0x28;
        assert!(!answers(&asked, &other), "an answer to an update");
        let mut bare = answer(&asked, 1);
        bare[4..HEADER].fill(0);
        bare.truncate(HEADER);
        assert!(answers(&asked, &bare), "FORMERR without a question");
        bare[3] = 0;
        assert!(!answers(&asked, &bare), "success without a question");
    }

    #[test]
    fn refusals() {
        let asked = query("a.example");
        for (code, refusal) in [(0, false), (1, false), (2, true), (3, false), (4, true), (5, true)] {
            assert_eq!(is_refusal(&answer(&asked, code)), refusal, "{code}");
        }
    }

    #[test]
    fn servfail_is_the_answer_to_its_query() {
        let asked = query("a.example");
        let fail = servfail(&asked);
        assert!(answers(&asked, &fail) && is_refusal(&fail));
        assert_eq!(id(&fail), id(&asked));
        assert_eq!(fail.len(), HEADER + 11 + 4, "the question and nothing more");
        assert_eq!(fail[6..HEADER], [0; 6]);
        // A question that can't be read is left out.
        let fail = servfail(&asked[..15]);
        assert_eq!((fail.len(), &fail[4..6]), (HEADER, &[0, 0][..]));
    }

    proptest! {
        #[test]
        fn nothing_breaks_it(bytes in proptest::collection::vec(any::<u8>(), 0..80), other in proptest::collection::vec(any::<u8>(), 0..80)) {
            if is_query(&bytes) {
                let fail = servfail(&bytes);
                prop_assert!(answers(&bytes, &fail));
                prop_assert!(is_refusal(&fail));
                answers(&bytes, &other);
            }
            servfail(&bytes);
        }
    }
}
