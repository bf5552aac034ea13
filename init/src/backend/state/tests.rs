//! Tests of reading and scripting.
