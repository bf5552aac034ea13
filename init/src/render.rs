//! Rules as text: [`iptables`] for `iptables-restore` (and in the very form in which `iptables-save` prints them, which is
//! how rules that are in place are known), [`nft`] for `nft -f`.

pub mod iptables;
pub mod nft;
