# Sourced. `option` has the names of the options that take a value, and what each is without; of `switches`, those without.
# Where an array `handed_on` is there, it takes unknown options with their values.
fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}
read_options() { # fills `option` from what stands before --, and `run` with what stands behind it
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        local name=${1#--}
        name=${name%%=*}
        case $1 in
            -h | --help)
                sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
                exit
                ;;
            --*)
                if [ -n "${option[$name]+known}" ]; then
                    [[ $1 != *=* ]] || set -- "--$name" "${1#*=}" "${@:2}"
                    if [ $# -lt 2 ] || [ "$2" = -- ]; then
                        fail "$1 stands without its value"
                    fi
                    option[$name]=$2
                    shift 2
                    continue
                elif [ -n "${switches[$name]+known}" ]; then
                    switches[$name]=yes
                    shift
                    continue
                fi
                ;;
        esac
        [[ $1 == -* ]] || fail "unknown option $1; options come first, and what to run stands behind --"
        declare -p handed_on &>/dev/null || fail "unknown option $1; $(basename "$0") --help lists them"
        handed_on+=("$1")
        shift
        while [ $# -gt 0 ] && [[ $1 != -* ]]; do # its values
            handed_on+=("$1")
            shift
        done
    done
    [ $# -ge 2 ] || fail "nothing to run; end with -- train CONFIG.yaml section.key=value ..."
    run=("${@:2}")
}
whole_numbers() { # NAME ...
    local name
    for name in "$@"; do
        [[ ${option[$name]} =~ ^[1-9][0-9]*$ ]] || fail "--$name ${option[$name]}: give a whole number from 1 up"
    done
}
