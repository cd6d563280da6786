//! `tiny`: writes the image of the tiny guests to a file, and says how minivmm boots one of them.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use guest_test::tiny::{self, FREE, Timer, TinyGuest};

/// Writes the image of the tiny guests, and prints the arguments with which `minivmm boot` boots one of them
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the image is written
    image: PathBuf,
    /// Which guest
    #[arg(value_enum)]
    guest: Kind,
    /// How many pages it works on
    #[arg(long, default_value_t = 1024)]
    pages: u64,
    /// How much it does nothing in each tick
    #[arg(long, default_value_t = 0)]
    idle: u64,
    /// A line every so many ticks
    #[arg(long, default_value_t = 100)]
    every: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    /// Stamps pages and checks them
    Stomper,
    /// Is woken by a timer of its processor, every millisecond
    Timer,
    /// Is woken by the machine's oldest timer, every millisecond
    Pit,
    /// Keeps patterns in registers
    Registers,
    /// Touches pages that nobody has touched
    Toucher,
    /// Marks pages on its first processor
    Marker,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let (pages, idle) = (arguments.pages, arguments.idle);
    let timer = |timer| TinyGuest::Timer {
        tick_micros: 1000,
        timer,
    };
    let mut guest = match arguments.guest {
        Kind::Stomper => TinyGuest::stomper(pages),
        Kind::Timer => timer(Timer::LocalApic),
        Kind::Pit => timer(Timer::Pit),
        Kind::Registers => TinyGuest::Registers { idle },
        Kind::Toucher => TinyGuest::Toucher {
            pages,
            base: FREE,
            idle,
        },
        Kind::Marker => TinyGuest::Marker {
            pages,
            base: FREE,
            idle,
        },
    };
    if let TinyGuest::Stomper { idle: its, .. } = &mut guest {
        *its = idle;
    }
    let path = arguments.image;
    std::fs::write(&path, tiny::image())
        .with_context(|| format!("{} cannot be written", path.display()))?;
    let words: Vec<String> = guest
        .words(arguments.every)
        .iter()
        .map(u64::to_string)
        .collect();
    println!("--flat {} --words {}", path.display(), words.join(","));
    Ok(())
}
