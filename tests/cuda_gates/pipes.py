"""Which pipe of a multiprocessor runs an instruction."""

from __future__ import annotations

PIPES = {
    "fma": """FADD FMUL FFMA FADD2 FMUL2 FFMA2 FADD32I FMUL32I FFMA32I FSWZADD HFMA2 HADD2 HMUL2 IMAD IMUL FCHK""",
    "alu": """LOP3 LOP IADD3 IADD VIADD LEA SHF SHL SHR SEL FSEL FMNMX FMNMX3 FSETP FSET ISETP PRMT MOV PLOP3 IABS
              VIMNMX VIMNMX3 VIADDMNMX IMNMX P2R R2P HMNMX2 HSET2 HSETP2 VHMNMX F2FP SGXT BMSK CS2R VABSDIFF
              VABSDIFF4 I2FP I2IP""",
    "xu": """MUFU F2F F2I I2F FRND POPC FLO BREV""",
    "lsu": """LDG STG LDS STS STAS LD ST LDL STL LDC SHFL ATOM ATOMS ATOMG RED REDG LDGSTS LDSM STSM S2R MEMBAR FENCE
              CCTL SYNCS B2R QSPC UBLKCP UBLKRED LDGDEPBAR DEPBAR ERRBAR CGAERRBAR REDUX MATCH MOVM""",
    "fp64": """DADD DMUL DFMA DSETP""",
    "tensor": """HMMA IMMA DMMA""",
    "uniform": """UMOV ULDC LDCU UIADD3 UIADD UVIADD UIMAD ULOP3 USHF ULEA USEL UISETP UPLOP3 UPRMT UP2UR UR2UP UFLO
                  UPOPC UBREV USGXT UBMSK S2UR R2UR VOTEU UCGABAR_ARV UCGABAR_WAIT UF2FP UVIMNMX UIABS UFADD UFMUL
                  UFFMA UFSETP UFSEL CREDUX""",
    "branch": """BRA BRX BRXU JMP JMX CALL RET EXIT BSSY BSYNC BREAK BMOV BAR WARPSYNC ENDCOLLECTIVE YIELD NOP NANOSLEEP
                 VOTE ELECT KILL BPT PMTRIG ACQBULK PREEXIT""",
}
PIPE_OF = {base: pipe for pipe, bases in PIPES.items() for base in bases.split()}


def pipe_of(opcode: str) -> str:
    """convert64: conversions from and to 64 bits. ValueError for an instruction that is not known here."""
    base, *words = opcode.split(".")
    if base in ("F2F", "F2I", "I2F", "FRND") and {"F64", "S64", "U64"} & set(words):
        return "convert64"
    if base not in PIPE_OF:
        raise ValueError(f"no pipe is known for {opcode}: tests/cuda_gates/pipes.py")
    return PIPE_OF[base]
