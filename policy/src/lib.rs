//! Pure decisions on the neutral model of [`weft_api::wire`]: no I/O, no clock, no sockets. The proxy enforces what is decided here,
//! and `weft why` and `weft policy preview` ask the very same code.
