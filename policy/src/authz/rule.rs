//! A rule: alternatives of sources, alternatives of operations, and conditions, all of which must hold.

use super::field::Field;
use super::request::Request;

/// Tests that must all hold.
pub(crate) type All = Box<[Field]>;

/// A compiled [`weft_api::wire::AuthorizationRule`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Any; none: every source.
    pub(crate) from: Box<[All]>,
    /// Any; none: every operation.
    pub(crate) to: Box<[All]>,
    pub(crate) when: All,
}

/// Which part of a rule a test is in, with its place in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    From(usize),
    To(usize),
    When,
}

/// Is told of each test that fails. That of the request path does nothing, and costs nothing.
pub(crate) trait Witness {
    fn failed(&mut self, place: Place, field: &Field, request: &Request<'_>);
}

/// Nobody looks.
pub(crate) struct Unseen;

impl Witness for Unseen {
    #[inline]
    fn failed(&mut self, _: Place, _: &Field, _: &Request<'_>) {}
}

impl Rule {
    /// Whether the rule matches. This is what decides, for the proxy as for those who ask why.
    #[inline]
    pub(crate) fn matches<W: Witness>(&self, request: &Request<'_>, witness: &mut W) -> bool {
        any(&self.from, Place::From, request, witness)
            && any(&self.to, Place::To, request, witness)
            && all(&self.when, Place::When, request, witness)
    }

    /// All tests, whatever their part.
    pub(crate) fn fields(&self) -> impl Iterator<Item = &Field> {
        self.from.iter().flatten().chain(self.to.iter().flatten()).chain(&*self.when)
    }
}

#[inline]
fn any<W: Witness>(alternatives: &[All], place: fn(usize) -> Place, request: &Request<'_>, witness: &mut W) -> bool {
    alternatives.is_empty() || alternatives.iter().enumerate().any(|(n, fields)| all(fields, place(n), request, witness))
}

#[inline]
fn all<W: Witness>(fields: &[Field], place: Place, request: &Request<'_>, witness: &mut W) -> bool {
    fields.iter().all(|field| {
        let holds = field.holds(request);
        if !holds {
            witness.failed(place, field, request);
        }
        holds
    })
}
